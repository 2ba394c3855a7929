from kvmesh.v1 import common_pb2 as _common_pb2
from kvmesh.v1 import engine_pb2 as _engine_pb2
from kvmesh.v1 import errors_pb2 as _errors_pb2
from kvmesh.v1 import events_pb2 as _events_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RouterInfo(_message.Message):
    __slots__ = ("id", "incarnation", "address", "node", "pid")
    ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    id: str
    incarnation: int
    address: str
    node: str
    pid: int
    def __init__(self, id: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class RouteRequest(_message.Message):
    __slots__ = ("request_id", "model", "block_hashes", "prompt_tokens", "max_new_tokens", "tenant", "session_id", "priority", "policy", "explain", "exclude_worker_ids", "deadline_ms", "needs", "adapter", "hint")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    NEEDS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    block_hashes: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: int
    max_new_tokens: int
    tenant: str
    session_id: str
    priority: int
    policy: str
    explain: bool
    exclude_worker_ids: _containers.RepeatedScalarFieldContainer[str]
    deadline_ms: int
    needs: _containers.RepeatedScalarFieldContainer[_common_pb2.Capability]
    adapter: str
    hint: ReturnHint
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., block_hashes: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., tenant: _Optional[str] = ..., session_id: _Optional[str] = ..., priority: _Optional[int] = ..., policy: _Optional[str] = ..., explain: _Optional[bool] = ..., exclude_worker_ids: _Optional[_Iterable[str]] = ..., deadline_ms: _Optional[int] = ..., needs: _Optional[_Iterable[_Union[_common_pb2.Capability, str]]] = ..., adapter: _Optional[str] = ..., hint: _Optional[_Union[ReturnHint, _Mapping]] = ...) -> None: ...

class ReturnHint(_message.Message):
    __slots__ = ("returns", "tool_call", "returns_in_s")
    RETURNS_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALL_FIELD_NUMBER: _ClassVar[int]
    RETURNS_IN_S_FIELD_NUMBER: _ClassVar[int]
    returns: bool
    tool_call: bool
    returns_in_s: float
    def __init__(self, returns: _Optional[bool] = ..., tool_call: _Optional[bool] = ..., returns_in_s: _Optional[float] = ...) -> None: ...

class RouteResponse(_message.Message):
    __slots__ = ("placement", "expected", "lease", "candidates", "policy")
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    placement: Placement
    expected: Expectation
    lease: Lease
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    policy: str
    def __init__(self, placement: _Optional[_Union[Placement, _Mapping]] = ..., expected: _Optional[_Union[Expectation, _Mapping]] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., policy: _Optional[str] = ...) -> None: ...

class SelectRequest(_message.Message):
    __slots__ = ("route",)
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    route: RouteRequest
    def __init__(self, route: _Optional[_Union[RouteRequest, _Mapping]] = ...) -> None: ...

class SelectResponse(_message.Message):
    __slots__ = ("placement", "expected", "candidates", "policy", "predicted_ttft_ms")
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    placement: Placement
    expected: Expectation
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    policy: str
    predicted_ttft_ms: float
    def __init__(self, placement: _Optional[_Union[Placement, _Mapping]] = ..., expected: _Optional[_Union[Expectation, _Mapping]] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., policy: _Optional[str] = ..., predicted_ttft_ms: _Optional[float] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("prefill", "decode", "bootstrap")
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    BOOTSTRAP_FIELD_NUMBER: _ClassVar[int]
    prefill: WorkerRef
    decode: WorkerRef
    bootstrap: _engine_pb2.Bootstrap
    def __init__(self, prefill: _Optional[_Union[WorkerRef, _Mapping]] = ..., decode: _Optional[_Union[WorkerRef, _Mapping]] = ..., bootstrap: _Optional[_Union[_engine_pb2.Bootstrap, _Mapping]] = ...) -> None: ...

class WorkerRef(_message.Message):
    __slots__ = ("id", "incarnation", "address")
    ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    id: str
    incarnation: int
    address: str
    def __init__(self, id: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ...) -> None: ...

class Expectation(_message.Message):
    __slots__ = ("cached",)
    CACHED_FIELD_NUMBER: _ClassVar[int]
    cached: _common_pb2.CachedTokens
    def __init__(self, cached: _Optional[_Union[_common_pb2.CachedTokens, _Mapping]] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("id", "ttl_ms")
    ID_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    id: int
    ttl_ms: int
    def __init__(self, id: _Optional[int] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("prefill_id", "decode_id", "cached", "cost", "terms")
    class TermsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    PREFILL_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    prefill_id: str
    decode_id: str
    cached: _common_pb2.CachedTokens
    cost: float
    terms: _containers.ScalarMap[str, float]
    def __init__(self, prefill_id: _Optional[str] = ..., decode_id: _Optional[str] = ..., cached: _Optional[_Union[_common_pb2.CachedTokens, _Mapping]] = ..., cost: _Optional[float] = ..., terms: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("reports",)
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    reports: _containers.RepeatedCompositeFieldContainer[LeaseReport]
    def __init__(self, reports: _Optional[_Iterable[_Union[LeaseReport, _Mapping]]] = ...) -> None: ...

class LeaseReport(_message.Message):
    __slots__ = ("lease_id", "prefill_done", "output_tokens", "ended", "transfer_ms")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_DONE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    prefill_done: bool
    output_tokens: int
    ended: bool
    transfer_ms: float
    def __init__(self, lease_id: _Optional[int] = ..., prefill_done: _Optional[bool] = ..., output_tokens: _Optional[int] = ..., ended: _Optional[bool] = ..., transfer_ms: _Optional[float] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ("unknown_lease_ids",)
    UNKNOWN_LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    unknown_lease_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, unknown_lease_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class RouteStreamRequest(_message.Message):
    __slots__ = ("routes", "reports", "cancels")
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    routes: _containers.RepeatedCompositeFieldContainer[NumberedRoute]
    reports: _containers.RepeatedCompositeFieldContainer[LeaseReport]
    cancels: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, routes: _Optional[_Iterable[_Union[NumberedRoute, _Mapping]]] = ..., reports: _Optional[_Iterable[_Union[LeaseReport, _Mapping]]] = ..., cancels: _Optional[_Iterable[int]] = ...) -> None: ...

class NumberedRoute(_message.Message):
    __slots__ = ("number", "route", "traceparent")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    number: int
    route: RouteRequest
    traceparent: str
    def __init__(self, number: _Optional[int] = ..., route: _Optional[_Union[RouteRequest, _Mapping]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class RouteStreamResponse(_message.Message):
    __slots__ = ("answers",)
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    answers: _containers.RepeatedCompositeFieldContainer[RouteAnswer]
    def __init__(self, answers: _Optional[_Iterable[_Union[RouteAnswer, _Mapping]]] = ...) -> None: ...

class RouteAnswer(_message.Message):
    __slots__ = ("number", "response", "error", "held")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    number: int
    response: RouteResponse
    error: _errors_pb2.Error
    held: Held
    def __init__(self, number: _Optional[int] = ..., response: _Optional[_Union[RouteResponse, _Mapping]] = ..., error: _Optional[_Union[_errors_pb2.Error, _Mapping]] = ..., held: _Optional[_Union[Held, _Mapping]] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStateResponse(_message.Message):
    __slots__ = ("policy", "workers", "index", "leases", "leases_expired_total", "bus_connected", "holders", "temperature", "held", "replica_id", "lease_digest", "replicas")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    LEASES_EXPIRED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BUS_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    policy: str
    workers: _containers.RepeatedCompositeFieldContainer[RoutedWorker]
    index: IndexStats
    leases: int
    leases_expired_total: int
    bus_connected: bool
    holders: _containers.RepeatedCompositeFieldContainer[IndexedHolder]
    temperature: float
    held: int
    replica_id: str
    lease_digest: LeaseDigest
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaState]
    def __init__(self, policy: _Optional[str] = ..., workers: _Optional[_Iterable[_Union[RoutedWorker, _Mapping]]] = ..., index: _Optional[_Union[IndexStats, _Mapping]] = ..., leases: _Optional[int] = ..., leases_expired_total: _Optional[int] = ..., bus_connected: _Optional[bool] = ..., holders: _Optional[_Iterable[_Union[IndexedHolder, _Mapping]]] = ..., temperature: _Optional[float] = ..., held: _Optional[int] = ..., replica_id: _Optional[str] = ..., lease_digest: _Optional[_Union[LeaseDigest, _Mapping]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaState, _Mapping]]] = ...) -> None: ...

class LeaseDigest(_message.Message):
    __slots__ = ("leases", "lease_sum", "speculative_blocks", "speculative_sum")
    LEASES_FIELD_NUMBER: _ClassVar[int]
    LEASE_SUM_FIELD_NUMBER: _ClassVar[int]
    SPECULATIVE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SPECULATIVE_SUM_FIELD_NUMBER: _ClassVar[int]
    leases: int
    lease_sum: int
    speculative_blocks: int
    speculative_sum: int
    def __init__(self, leases: _Optional[int] = ..., lease_sum: _Optional[int] = ..., speculative_blocks: _Optional[int] = ..., speculative_sum: _Optional[int] = ...) -> None: ...

class ReplicaState(_message.Message):
    __slots__ = ("id", "incarnation", "leases", "in_sync", "lag_ms")
    ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    IN_SYNC_FIELD_NUMBER: _ClassVar[int]
    LAG_MS_FIELD_NUMBER: _ClassVar[int]
    id: str
    incarnation: int
    leases: int
    in_sync: bool
    lag_ms: float
    def __init__(self, id: _Optional[str] = ..., incarnation: _Optional[int] = ..., leases: _Optional[int] = ..., in_sync: _Optional[bool] = ..., lag_ms: _Optional[float] = ...) -> None: ...

class IndexedHolder(_message.Message):
    __slots__ = ("id", "incarnation", "sequence", "live", "address", "digests", "forgotten")
    ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    id: str
    incarnation: int
    sequence: int
    live: bool
    address: str
    digests: _containers.RepeatedCompositeFieldContainer[_events_pb2.TierDigest]
    forgotten: int
    def __init__(self, id: _Optional[str] = ..., incarnation: _Optional[int] = ..., sequence: _Optional[int] = ..., live: _Optional[bool] = ..., address: _Optional[str] = ..., digests: _Optional[_Iterable[_Union[_events_pb2.TierDigest, _Mapping]]] = ..., forgotten: _Optional[int] = ...) -> None: ...

class RoutedWorker(_message.Message):
    __slots__ = ("info", "leases", "queued_prefill_tokens", "active_blocks", "indexed_blocks")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    INDEXED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    info: _common_pb2.WorkerInfo
    leases: int
    queued_prefill_tokens: int
    active_blocks: int
    indexed_blocks: int
    def __init__(self, info: _Optional[_Union[_common_pb2.WorkerInfo, _Mapping]] = ..., leases: _Optional[int] = ..., queued_prefill_tokens: _Optional[int] = ..., active_blocks: _Optional[int] = ..., indexed_blocks: _Optional[int] = ...) -> None: ...

class IndexStats(_message.Message):
    __slots__ = ("blocks", "workers", "bytes", "gaps_total", "divergences_total", "forgotten_total")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    GAPS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DIVERGENCES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_TOTAL_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    workers: int
    bytes: int
    gaps_total: int
    divergences_total: int
    forgotten_total: int
    def __init__(self, blocks: _Optional[int] = ..., workers: _Optional[int] = ..., bytes: _Optional[int] = ..., gaps_total: _Optional[int] = ..., divergences_total: _Optional[int] = ..., forgotten_total: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("decisions",)
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    decisions: _containers.RepeatedCompositeFieldContainer[Decision]
    def __init__(self, decisions: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("request_id", "model", "policy", "at", "held_ms", "prompt_tokens", "winner", "candidates", "predicted_ttft_ms", "actual_ttft_ms", "shadows")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    HELD_MS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WINNER_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    SHADOWS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    policy: str
    at: float
    held_ms: float
    prompt_tokens: int
    winner: Candidate
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    predicted_ttft_ms: float
    actual_ttft_ms: float
    shadows: _containers.RepeatedCompositeFieldContainer[ShadowChoice]
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., policy: _Optional[str] = ..., at: _Optional[float] = ..., held_ms: _Optional[float] = ..., prompt_tokens: _Optional[int] = ..., winner: _Optional[_Union[Candidate, _Mapping]] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., predicted_ttft_ms: _Optional[float] = ..., actual_ttft_ms: _Optional[float] = ..., shadows: _Optional[_Iterable[_Union[ShadowChoice, _Mapping]]] = ...) -> None: ...

class ShadowChoice(_message.Message):
    __slots__ = ("policy", "prefill_id", "decode_id", "cost", "ttft_ms", "live_cost", "live_ttft_ms")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_ID_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    LIVE_COST_FIELD_NUMBER: _ClassVar[int]
    LIVE_TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    policy: str
    prefill_id: str
    decode_id: str
    cost: float
    ttft_ms: float
    live_cost: float
    live_ttft_ms: float
    def __init__(self, policy: _Optional[str] = ..., prefill_id: _Optional[str] = ..., decode_id: _Optional[str] = ..., cost: _Optional[float] = ..., ttft_ms: _Optional[float] = ..., live_cost: _Optional[float] = ..., live_ttft_ms: _Optional[float] = ...) -> None: ...

class GetRatesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetRatesResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelRates]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelRates, _Mapping]]] = ...) -> None: ...

class ModelRates(_message.Message):
    __slots__ = ("model", "classes", "workers", "predictions", "bias_ms", "error_ms", "actual_ms", "links")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    BIAS_MS_FIELD_NUMBER: _ClassVar[int]
    ERROR_MS_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_MS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    model: str
    classes: _containers.RepeatedCompositeFieldContainer[ClassRates]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerPace]
    predictions: int
    bias_ms: float
    error_ms: float
    actual_ms: float
    links: _containers.RepeatedCompositeFieldContainer[LinkPace]
    def __init__(self, model: _Optional[str] = ..., classes: _Optional[_Iterable[_Union[ClassRates, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[WorkerPace, _Mapping]]] = ..., predictions: _Optional[int] = ..., bias_ms: _Optional[float] = ..., error_ms: _Optional[float] = ..., actual_ms: _Optional[float] = ..., links: _Optional[_Iterable[_Union[LinkPace, _Mapping]]] = ...) -> None: ...

class ClassRates(_message.Message):
    __slots__ = ("hardware_class", "workers", "laws")
    HARDWARE_CLASS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    LAWS_FIELD_NUMBER: _ClassVar[int]
    hardware_class: str
    workers: int
    laws: _containers.RepeatedCompositeFieldContainer[Law]
    def __init__(self, hardware_class: _Optional[str] = ..., workers: _Optional[int] = ..., laws: _Optional[_Iterable[_Union[Law, _Mapping]]] = ...) -> None: ...

class Law(_message.Message):
    __slots__ = ("name", "coefficients", "observations", "error")
    class CoefficientsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENTS_FIELD_NUMBER: _ClassVar[int]
    OBSERVATIONS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    coefficients: _containers.ScalarMap[str, float]
    observations: int
    error: float
    def __init__(self, name: _Optional[str] = ..., coefficients: _Optional[_Mapping[str, float]] = ..., observations: _Optional[int] = ..., error: _Optional[float] = ...) -> None: ...

class WorkerPace(_message.Message):
    __slots__ = ("worker_id", "hardware_class", "slowness", "observations", "error")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_CLASS_FIELD_NUMBER: _ClassVar[int]
    SLOWNESS_FIELD_NUMBER: _ClassVar[int]
    OBSERVATIONS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    hardware_class: str
    slowness: float
    observations: int
    error: float
    def __init__(self, worker_id: _Optional[str] = ..., hardware_class: _Optional[str] = ..., slowness: _Optional[float] = ..., observations: _Optional[int] = ..., error: _Optional[float] = ...) -> None: ...

class LinkPace(_message.Message):
    __slots__ = ("prefill_id", "decode_id", "slowness", "observations", "error")
    PREFILL_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_ID_FIELD_NUMBER: _ClassVar[int]
    SLOWNESS_FIELD_NUMBER: _ClassVar[int]
    OBSERVATIONS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    prefill_id: str
    decode_id: str
    slowness: float
    observations: int
    error: float
    def __init__(self, prefill_id: _Optional[str] = ..., decode_id: _Optional[str] = ..., slowness: _Optional[float] = ..., observations: _Optional[int] = ..., error: _Optional[float] = ...) -> None: ...

class ConfigureRequest(_message.Message):
    __slots__ = ("policy", "temperature", "max_waiting", "max_wait_s", "shadow")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_FIELD_NUMBER: _ClassVar[int]
    MAX_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    policy: str
    temperature: float
    max_waiting: int
    max_wait_s: float
    shadow: PolicyNames
    def __init__(self, policy: _Optional[str] = ..., temperature: _Optional[float] = ..., max_waiting: _Optional[int] = ..., max_wait_s: _Optional[float] = ..., shadow: _Optional[_Union[PolicyNames, _Mapping]] = ...) -> None: ...

class PolicyNames(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class ConfigureResponse(_message.Message):
    __slots__ = ("policy", "temperature", "max_waiting", "max_wait_s", "shadow")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_FIELD_NUMBER: _ClassVar[int]
    MAX_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    policy: str
    temperature: float
    max_waiting: int
    max_wait_s: float
    shadow: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, policy: _Optional[str] = ..., temperature: _Optional[float] = ..., max_waiting: _Optional[int] = ..., max_wait_s: _Optional[float] = ..., shadow: _Optional[_Iterable[str]] = ...) -> None: ...
