from kvmesh.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("id", "node", "tiers", "engines", "eviction", "nvme", "pins", "pinned_bytes", "network", "objects")
    ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    EVICTION_FIELD_NUMBER: _ClassVar[int]
    NVME_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    node: str
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    engines: int
    eviction: str
    nvme: NvmeStats
    pins: int
    pinned_bytes: int
    network: NetworkStats
    objects: ObjectStats
    def __init__(self, id: _Optional[str] = ..., node: _Optional[str] = ..., tiers: _Optional[_Iterable[_Union[TierStats, _Mapping]]] = ..., engines: _Optional[int] = ..., eviction: _Optional[str] = ..., nvme: _Optional[_Union[NvmeStats, _Mapping]] = ..., pins: _Optional[int] = ..., pinned_bytes: _Optional[int] = ..., network: _Optional[_Union[NetworkStats, _Mapping]] = ..., objects: _Optional[_Union[ObjectStats, _Mapping]] = ...) -> None: ...

class NetworkStats(_message.Message):
    __slots__ = ("fetched_total", "fetched_bytes_total", "failed", "lent_total", "lent", "bytes_per_s")
    class FailedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class BytesPerSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    FETCHED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LENT_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    fetched_total: int
    fetched_bytes_total: int
    failed: _containers.ScalarMap[str, int]
    lent_total: int
    lent: int
    bytes_per_s: _containers.ScalarMap[str, int]
    def __init__(self, fetched_total: _Optional[int] = ..., fetched_bytes_total: _Optional[int] = ..., failed: _Optional[_Mapping[str, int]] = ..., lent_total: _Optional[int] = ..., lent: _Optional[int] = ..., bytes_per_s: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ObjectStats(_message.Message):
    __slots__ = ("url", "problem", "outages_total", "recovered", "written_total", "written_bytes_total", "waiting", "skipped", "recalled_total", "read_bytes_total", "missed", "bytes_per_s")
    class SkippedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class MissedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    URL_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    OUTAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    RECOVERED_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_TOTAL_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    RECALLED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    url: str
    problem: str
    outages_total: int
    recovered: int
    written_total: int
    written_bytes_total: int
    waiting: int
    skipped: _containers.ScalarMap[str, int]
    recalled_total: int
    read_bytes_total: int
    missed: _containers.ScalarMap[str, int]
    bytes_per_s: int
    def __init__(self, url: _Optional[str] = ..., problem: _Optional[str] = ..., outages_total: _Optional[int] = ..., recovered: _Optional[int] = ..., written_total: _Optional[int] = ..., written_bytes_total: _Optional[int] = ..., waiting: _Optional[int] = ..., skipped: _Optional[_Mapping[str, int]] = ..., recalled_total: _Optional[int] = ..., read_bytes_total: _Optional[int] = ..., missed: _Optional[_Mapping[str, int]] = ..., bytes_per_s: _Optional[int] = ...) -> None: ...

class TierStats(_message.Message):
    __slots__ = ("tier", "capacity_bytes", "used_bytes", "blocks", "blocks_in_use", "stored_total", "loaded_total", "evicted_total", "lookups_total", "hits_total", "corrupt_total", "evicted", "scrubbed_total", "scrub_passes_total", "hinted_total")
    class EvictedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TIER_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    STORED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LOADED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EVICTED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LOOKUPS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HITS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    SCRUBBED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SCRUB_PASSES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HINTED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    tier: _common_pb2.Tier
    capacity_bytes: int
    used_bytes: int
    blocks: int
    blocks_in_use: int
    stored_total: int
    loaded_total: int
    evicted_total: int
    lookups_total: int
    hits_total: int
    corrupt_total: int
    evicted: _containers.ScalarMap[str, int]
    scrubbed_total: int
    scrub_passes_total: int
    hinted_total: int
    def __init__(self, tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., blocks_in_use: _Optional[int] = ..., stored_total: _Optional[int] = ..., loaded_total: _Optional[int] = ..., evicted_total: _Optional[int] = ..., lookups_total: _Optional[int] = ..., hits_total: _Optional[int] = ..., corrupt_total: _Optional[int] = ..., evicted: _Optional[_Mapping[str, int]] = ..., scrubbed_total: _Optional[int] = ..., scrub_passes_total: _Optional[int] = ..., hinted_total: _Optional[int] = ...) -> None: ...

class NvmeStats(_message.Message):
    __slots__ = ("problem", "io", "outages_total", "recovered", "spilled_total", "shed_total", "unlikely_total", "over_budget_total", "unplaced_total", "promoted_total", "failed_total", "coming", "written_bytes_total", "read_bytes_total", "late_total")
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    IO_FIELD_NUMBER: _ClassVar[int]
    OUTAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    RECOVERED_FIELD_NUMBER: _ClassVar[int]
    SPILLED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SHED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    UNLIKELY_TOTAL_FIELD_NUMBER: _ClassVar[int]
    OVER_BUDGET_TOTAL_FIELD_NUMBER: _ClassVar[int]
    UNPLACED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FAILED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    COMING_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LATE_TOTAL_FIELD_NUMBER: _ClassVar[int]
    problem: str
    io: str
    outages_total: int
    recovered: int
    spilled_total: int
    shed_total: int
    unlikely_total: int
    over_budget_total: int
    unplaced_total: int
    promoted_total: int
    failed_total: int
    coming: int
    written_bytes_total: int
    read_bytes_total: int
    late_total: int
    def __init__(self, problem: _Optional[str] = ..., io: _Optional[str] = ..., outages_total: _Optional[int] = ..., recovered: _Optional[int] = ..., spilled_total: _Optional[int] = ..., shed_total: _Optional[int] = ..., unlikely_total: _Optional[int] = ..., over_budget_total: _Optional[int] = ..., unplaced_total: _Optional[int] = ..., promoted_total: _Optional[int] = ..., failed_total: _Optional[int] = ..., coming: _Optional[int] = ..., written_bytes_total: _Optional[int] = ..., read_bytes_total: _Optional[int] = ..., late_total: _Optional[int] = ...) -> None: ...

class FlushRequest(_message.Message):
    __slots__ = ("tier",)
    TIER_FIELD_NUMBER: _ClassVar[int]
    tier: _common_pb2.Tier
    def __init__(self, tier: _Optional[_Union[_common_pb2.Tier, str]] = ...) -> None: ...

class FlushResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("tenant", "model", "digests", "ttl_ms")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    model: str
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    ttl_ms: int
    def __init__(self, tenant: _Optional[str] = ..., model: _Optional[str] = ..., digests: _Optional[_Iterable[bytes]] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("receipt", "blocks", "bytes")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    receipt: int
    blocks: int
    bytes: int
    def __init__(self, receipt: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("receipt",)
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    receipt: int
    def __init__(self, receipt: _Optional[int] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("released",)
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    released: bool
    def __init__(self, released: _Optional[bool] = ...) -> None: ...

class HintRequest(_message.Message):
    __slots__ = ("model", "digests", "hashes", "session", "returns", "tool_call", "returns_in_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RETURNS_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALL_FIELD_NUMBER: _ClassVar[int]
    RETURNS_IN_S_FIELD_NUMBER: _ClassVar[int]
    model: str
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    hashes: _containers.RepeatedScalarFieldContainer[int]
    session: int
    returns: bool
    tool_call: bool
    returns_in_s: float
    def __init__(self, model: _Optional[str] = ..., digests: _Optional[_Iterable[bytes]] = ..., hashes: _Optional[_Iterable[int]] = ..., session: _Optional[int] = ..., returns: _Optional[bool] = ..., tool_call: _Optional[bool] = ..., returns_in_s: _Optional[float] = ...) -> None: ...

class HintResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("model", "digests", "hashes", "tier", "within_ms", "source")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    WITHIN_MS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    model: str
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    hashes: _containers.RepeatedScalarFieldContainer[int]
    tier: _common_pb2.Tier
    within_ms: int
    source: str
    def __init__(self, model: _Optional[str] = ..., digests: _Optional[_Iterable[bytes]] = ..., hashes: _Optional[_Iterable[int]] = ..., tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., within_ms: _Optional[int] = ..., source: _Optional[str] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("here", "coming")
    HERE_FIELD_NUMBER: _ClassVar[int]
    COMING_FIELD_NUMBER: _ClassVar[int]
    here: int
    coming: int
    def __init__(self, here: _Optional[int] = ..., coming: _Optional[int] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("tier", "model", "digests")
    TIER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    tier: _common_pb2.Tier
    model: str
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., model: _Optional[str] = ..., digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class EvictResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class LocateRequest(_message.Message):
    __slots__ = ("model", "digests")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, model: _Optional[str] = ..., digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class LocateResponse(_message.Message):
    __slots__ = ("namespaces",)
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[LocatedBlocks]
    def __init__(self, namespaces: _Optional[_Iterable[_Union[LocatedBlocks, _Mapping]]] = ...) -> None: ...

class LocatedBlocks(_message.Message):
    __slots__ = ("model", "revision", "dtype", "layout", "rank", "ranks", "blocks")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    dtype: str
    layout: str
    rank: int
    ranks: int
    blocks: _containers.RepeatedCompositeFieldContainer[BlockTiers]
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., dtype: _Optional[str] = ..., layout: _Optional[str] = ..., rank: _Optional[int] = ..., ranks: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[BlockTiers, _Mapping]]] = ...) -> None: ...

class BlockTiers(_message.Message):
    __slots__ = ("tiers",)
    TIERS_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedScalarFieldContainer[_common_pb2.Tier]
    def __init__(self, tiers: _Optional[_Iterable[_Union[_common_pb2.Tier, str]]] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("tier", "bytes_per_s")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    tier: _common_pb2.Tier
    bytes_per_s: int
    def __init__(self, tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., bytes_per_s: _Optional[int] = ...) -> None: ...

class VerifyResponse(_message.Message):
    __slots__ = ("tier", "blocks", "bytes", "corrupt", "complete", "problem")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    tier: _common_pb2.Tier
    blocks: int
    bytes: int
    corrupt: _containers.RepeatedCompositeFieldContainer[CorruptBlock]
    complete: bool
    problem: str
    def __init__(self, tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., corrupt: _Optional[_Iterable[_Union[CorruptBlock, _Mapping]]] = ..., complete: _Optional[bool] = ..., problem: _Optional[str] = ...) -> None: ...

class CorruptBlock(_message.Message):
    __slots__ = ("tier", "digest")
    TIER_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    tier: _common_pb2.Tier
    digest: bytes
    def __init__(self, tier: _Optional[_Union[_common_pb2.Tier, str]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class WarmRequest(_message.Message):
    __slots__ = ("model", "source")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    model: str
    source: str
    def __init__(self, model: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class HottestRequest(_message.Message):
    __slots__ = ("model", "most_blocks")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    model: str
    most_blocks: int
    def __init__(self, model: _Optional[str] = ..., most_blocks: _Optional[int] = ...) -> None: ...

class HottestResponse(_message.Message):
    __slots__ = ("namespace", "parent", "digests")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    namespace: BlockNamespace
    parent: bytes
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, namespace: _Optional[_Union[BlockNamespace, _Mapping]] = ..., parent: _Optional[bytes] = ..., digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class WarmResponse(_message.Message):
    __slots__ = ("brought", "failed", "to_come", "left")
    BROUGHT_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    TO_COME_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    brought: int
    failed: int
    to_come: int
    left: int
    def __init__(self, brought: _Optional[int] = ..., failed: _Optional[int] = ..., to_come: _Optional[int] = ..., left: _Optional[int] = ...) -> None: ...

class PersistRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PersistResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BlockNamespace(_message.Message):
    __slots__ = ("model", "revision", "dtype", "layout", "rank", "ranks", "segments")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    dtype: str
    layout: str
    rank: int
    ranks: int
    segments: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., dtype: _Optional[str] = ..., layout: _Optional[str] = ..., rank: _Optional[int] = ..., ranks: _Optional[int] = ..., segments: _Optional[_Iterable[int]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("namespace", "hashes", "ttl_ms", "agent")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    namespace: BlockNamespace
    hashes: _containers.RepeatedScalarFieldContainer[int]
    ttl_ms: int
    agent: str
    def __init__(self, namespace: _Optional[_Union[BlockNamespace, _Mapping]] = ..., hashes: _Optional[_Iterable[int]] = ..., ttl_ms: _Optional[int] = ..., agent: _Optional[str] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("receipt", "digests", "addresses", "slot_bytes", "agent", "metadata")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    receipt: int
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    addresses: _containers.RepeatedScalarFieldContainer[int]
    slot_bytes: int
    agent: str
    metadata: bytes
    def __init__(self, receipt: _Optional[int] = ..., digests: _Optional[_Iterable[bytes]] = ..., addresses: _Optional[_Iterable[int]] = ..., slot_bytes: _Optional[int] = ..., agent: _Optional[str] = ..., metadata: _Optional[bytes] = ...) -> None: ...

class ReturnRequest(_message.Message):
    __slots__ = ("receipt", "wrong")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    WRONG_FIELD_NUMBER: _ClassVar[int]
    receipt: int
    wrong: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, receipt: _Optional[int] = ..., wrong: _Optional[_Iterable[int]] = ...) -> None: ...

class ReturnResponse(_message.Message):
    __slots__ = ("dropped",)
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    dropped: int
    def __init__(self, dropped: _Optional[int] = ...) -> None: ...
