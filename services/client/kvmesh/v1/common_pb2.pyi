from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
    ROLE_AGGREGATED: _ClassVar[Role]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_DEVICE: _ClassVar[Tier]
    TIER_HOST: _ClassVar[Tier]
    TIER_NVME: _ClassVar[Tier]
    TIER_NETWORK: _ClassVar[Tier]

class Capability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAPABILITY_UNSPECIFIED: _ClassVar[Capability]
    CAPABILITY_GENERATE: _ClassVar[Capability]
    CAPABILITY_EMBED: _ClassVar[Capability]
    CAPABILITY_CONSTRAIN: _ClassVar[Capability]
    CAPABILITY_LOGPROBS: _ClassVar[Capability]

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_STARTING: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_AGGREGATED: Role
TIER_UNSPECIFIED: Tier
TIER_DEVICE: Tier
TIER_HOST: Tier
TIER_NVME: Tier
TIER_NETWORK: Tier
CAPABILITY_UNSPECIFIED: Capability
CAPABILITY_GENERATE: Capability
CAPABILITY_EMBED: Capability
CAPABILITY_CONSTRAIN: Capability
CAPABILITY_LOGPROBS: Capability
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_STARTING: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_DRAINING: WorkerState

class CachedTokens(_message.Message):
    __slots__ = ("device", "host", "nvme", "network")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    NVME_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    device: int
    host: int
    nvme: int
    network: int
    def __init__(self, device: _Optional[int] = ..., host: _Optional[int] = ..., nvme: _Optional[int] = ..., network: _Optional[int] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "path", "context_length", "vocab_size", "eos_token_ids", "aliases", "tool_format", "reasoning_format", "capabilities", "embedding_size", "cache_salt", "adapters")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    TOOL_FORMAT_FIELD_NUMBER: _ClassVar[int]
    REASONING_FORMAT_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_SIZE_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    context_length: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    aliases: _containers.RepeatedScalarFieldContainer[str]
    tool_format: str
    reasoning_format: str
    capabilities: _containers.RepeatedScalarFieldContainer[Capability]
    embedding_size: int
    cache_salt: str
    adapters: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., context_length: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., aliases: _Optional[_Iterable[str]] = ..., tool_format: _Optional[str] = ..., reasoning_format: _Optional[str] = ..., capabilities: _Optional[_Iterable[_Union[Capability, str]]] = ..., embedding_size: _Optional[int] = ..., cache_salt: _Optional[str] = ..., adapters: _Optional[_Iterable[str]] = ...) -> None: ...

class KvInfo(_message.Message):
    __slots__ = ("page_size", "total_blocks", "block_bytes", "namespace")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    total_blocks: int
    block_bytes: int
    namespace: bytes
    def __init__(self, page_size: _Optional[int] = ..., total_blocks: _Optional[int] = ..., block_bytes: _Optional[int] = ..., namespace: _Optional[bytes] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("id", "incarnation", "role", "engine", "state", "address", "node", "model", "kv", "bootstrap", "load", "pid", "device", "pass_tokens", "probe")
    ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    BOOTSTRAP_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PASS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    id: str
    incarnation: int
    role: Role
    engine: str
    state: WorkerState
    address: str
    node: str
    model: ModelInfo
    kv: KvInfo
    bootstrap: BootstrapAddress
    load: WorkerLoad
    pid: int
    device: str
    pass_tokens: int
    probe: Probe
    def __init__(self, id: _Optional[str] = ..., incarnation: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., engine: _Optional[str] = ..., state: _Optional[_Union[WorkerState, str]] = ..., address: _Optional[str] = ..., node: _Optional[str] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., kv: _Optional[_Union[KvInfo, _Mapping]] = ..., bootstrap: _Optional[_Union[BootstrapAddress, _Mapping]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., pid: _Optional[int] = ..., device: _Optional[str] = ..., pass_tokens: _Optional[int] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("prefill", "decode", "transfer")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    prefill: _containers.RepeatedCompositeFieldContainer[PrefillTime]
    decode: _containers.RepeatedCompositeFieldContainer[StepTime]
    transfer: _containers.RepeatedCompositeFieldContainer[TransferTime]
    def __init__(self, prefill: _Optional[_Iterable[_Union[PrefillTime, _Mapping]]] = ..., decode: _Optional[_Iterable[_Union[StepTime, _Mapping]]] = ..., transfer: _Optional[_Iterable[_Union[TransferTime, _Mapping]]] = ...) -> None: ...

class PrefillTime(_message.Message):
    __slots__ = ("tokens", "ms")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    MS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    ms: float
    def __init__(self, tokens: _Optional[int] = ..., ms: _Optional[float] = ...) -> None: ...

class StepTime(_message.Message):
    __slots__ = ("streams", "pool_share", "ms")
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    POOL_SHARE_FIELD_NUMBER: _ClassVar[int]
    MS_FIELD_NUMBER: _ClassVar[int]
    streams: int
    pool_share: float
    ms: float
    def __init__(self, streams: _Optional[int] = ..., pool_share: _Optional[float] = ..., ms: _Optional[float] = ...) -> None: ...

class TransferTime(_message.Message):
    __slots__ = ("tokens", "ms")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    MS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    ms: float
    def __init__(self, tokens: _Optional[int] = ..., ms: _Optional[float] = ...) -> None: ...

class BootstrapAddress(_message.Message):
    __slots__ = ("host", "port")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    host: str
    port: int
    def __init__(self, host: _Optional[str] = ..., port: _Optional[int] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("requests", "queued_requests", "blocks_used", "blocks_cached", "transfers", "prompt_tokens_total", "output_tokens_total", "transferred_bytes_total")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TRANSFERRED_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    requests: int
    queued_requests: int
    blocks_used: int
    blocks_cached: int
    transfers: int
    prompt_tokens_total: int
    output_tokens_total: int
    transferred_bytes_total: int
    def __init__(self, requests: _Optional[int] = ..., queued_requests: _Optional[int] = ..., blocks_used: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., transfers: _Optional[int] = ..., prompt_tokens_total: _Optional[int] = ..., output_tokens_total: _Optional[int] = ..., transferred_bytes_total: _Optional[int] = ...) -> None: ...
