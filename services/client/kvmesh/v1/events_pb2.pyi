from kvmesh.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SnapshotRequest(_message.Message):
    __slots__ = ("holder_id",)
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    def __init__(self, holder_id: _Optional[str] = ...) -> None: ...

class SnapshotResponse(_message.Message):
    __slots__ = ("batch",)
    BATCH_FIELD_NUMBER: _ClassVar[int]
    batch: KvEventBatch
    def __init__(self, batch: _Optional[_Union[KvEventBatch, _Mapping]] = ...) -> None: ...

class ReplayRequest(_message.Message):
    __slots__ = ("holder_id", "incarnation", "from_sequence")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FROM_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    incarnation: int
    from_sequence: int
    def __init__(self, holder_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., from_sequence: _Optional[int] = ...) -> None: ...

class ReplayResponse(_message.Message):
    __slots__ = ("batch",)
    BATCH_FIELD_NUMBER: _ClassVar[int]
    batch: KvEventBatch
    def __init__(self, batch: _Optional[_Union[KvEventBatch, _Mapping]] = ...) -> None: ...

class KvEventBatch(_message.Message):
    __slots__ = ("holder_id", "incarnation", "sequence", "traceparent", "node", "ops", "counts", "hashes", "parents", "digests", "address")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    OPS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    incarnation: int
    sequence: int
    traceparent: str
    node: str
    ops: _containers.RepeatedScalarFieldContainer[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    hashes: _containers.RepeatedScalarFieldContainer[int]
    parents: _containers.RepeatedScalarFieldContainer[int]
    digests: _containers.RepeatedCompositeFieldContainer[TierDigest]
    address: str
    def __init__(self, holder_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., sequence: _Optional[int] = ..., traceparent: _Optional[str] = ..., node: _Optional[str] = ..., ops: _Optional[_Iterable[int]] = ..., counts: _Optional[_Iterable[int]] = ..., hashes: _Optional[_Iterable[int]] = ..., parents: _Optional[_Iterable[int]] = ..., digests: _Optional[_Iterable[_Union[TierDigest, _Mapping]]] = ..., address: _Optional[str] = ...) -> None: ...

class TierDigest(_message.Message):
    __slots__ = ("tier", "count", "sum_low", "sum_high")
    TIER_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SUM_LOW_FIELD_NUMBER: _ClassVar[int]
    SUM_HIGH_FIELD_NUMBER: _ClassVar[int]
    tier: _common_pb2.Tier
    count: int
    sum_low: int
    sum_high: int
    def __init__(self, tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., count: _Optional[int] = ..., sum_low: _Optional[int] = ..., sum_high: _Optional[int] = ...) -> None: ...
