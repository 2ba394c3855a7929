from kvmesh.v1 import common_pb2 as _common_pb2
from kvmesh.v1 import router_pb2 as _router_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicaMessage(_message.Message):
    __slots__ = ("replica_id", "incarnation", "sequence", "digest", "batch", "taken", "reports", "reports_taken", "leaving")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    TAKEN_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    REPORTS_TAKEN_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    incarnation: int
    sequence: int
    digest: int
    batch: LeaseBatch
    taken: _containers.RepeatedCompositeFieldContainer[Taken]
    reports: _containers.RepeatedCompositeFieldContainer[ForwardedReport]
    reports_taken: _containers.RepeatedCompositeFieldContainer[ReportsTaken]
    leaving: bool
    def __init__(self, replica_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., sequence: _Optional[int] = ..., digest: _Optional[int] = ..., batch: _Optional[_Union[LeaseBatch, _Mapping]] = ..., taken: _Optional[_Iterable[_Union[Taken, _Mapping]]] = ..., reports: _Optional[_Iterable[_Union[ForwardedReport, _Mapping]]] = ..., reports_taken: _Optional[_Iterable[_Union[ReportsTaken, _Mapping]]] = ..., leaving: _Optional[bool] = ...) -> None: ...

class LeaseBatch(_message.Message):
    __slots__ = ("opened", "progressed", "ended", "parts", "part")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    PROGRESSED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    opened: _containers.RepeatedCompositeFieldContainer[ToldLease]
    progressed: _containers.RepeatedCompositeFieldContainer[LeaseProgress]
    ended: _containers.RepeatedScalarFieldContainer[int]
    parts: int
    part: int
    def __init__(self, opened: _Optional[_Iterable[_Union[ToldLease, _Mapping]]] = ..., progressed: _Optional[_Iterable[_Union[LeaseProgress, _Mapping]]] = ..., ended: _Optional[_Iterable[int]] = ..., parts: _Optional[int] = ..., part: _Optional[int] = ...) -> None: ...

class ToldLease(_message.Message):
    __slots__ = ("lease_id", "model", "prefill", "decode", "prompt_tokens", "cached", "block_hashes", "prefilled", "output_tokens", "takeovers")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TAKEOVERS_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    model: str
    prefill: _router_pb2.WorkerRef
    decode: _router_pb2.WorkerRef
    prompt_tokens: int
    cached: _common_pb2.CachedTokens
    block_hashes: _containers.RepeatedScalarFieldContainer[int]
    prefilled: bool
    output_tokens: int
    takeovers: int
    def __init__(self, lease_id: _Optional[int] = ..., model: _Optional[str] = ..., prefill: _Optional[_Union[_router_pb2.WorkerRef, _Mapping]] = ..., decode: _Optional[_Union[_router_pb2.WorkerRef, _Mapping]] = ..., prompt_tokens: _Optional[int] = ..., cached: _Optional[_Union[_common_pb2.CachedTokens, _Mapping]] = ..., block_hashes: _Optional[_Iterable[int]] = ..., prefilled: _Optional[bool] = ..., output_tokens: _Optional[int] = ..., takeovers: _Optional[int] = ...) -> None: ...

class LeaseProgress(_message.Message):
    __slots__ = ("lease_id", "prefilled", "output_tokens", "transfer_ms")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    prefilled: bool
    output_tokens: int
    transfer_ms: float
    def __init__(self, lease_id: _Optional[int] = ..., prefilled: _Optional[bool] = ..., output_tokens: _Optional[int] = ..., transfer_ms: _Optional[float] = ...) -> None: ...

class Taken(_message.Message):
    __slots__ = ("replica_id", "incarnation", "sequence", "resync")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RESYNC_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    incarnation: int
    sequence: int
    resync: bool
    def __init__(self, replica_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., sequence: _Optional[int] = ..., resync: _Optional[bool] = ...) -> None: ...

class ForwardedReport(_message.Message):
    __slots__ = ("replica_id", "number", "report")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    number: int
    report: _router_pb2.LeaseReport
    def __init__(self, replica_id: _Optional[str] = ..., number: _Optional[int] = ..., report: _Optional[_Union[_router_pb2.LeaseReport, _Mapping]] = ...) -> None: ...

class ReportsTaken(_message.Message):
    __slots__ = ("replica_id", "incarnation", "numbers")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    incarnation: int
    numbers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, replica_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., numbers: _Optional[_Iterable[int]] = ...) -> None: ...
