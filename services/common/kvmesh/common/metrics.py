"""Every Prometheus metric of kvmesh, by role; names start with `kvmesh_<role>_`.

Each function builds its family once a process, so that a role exposes only what it measures. Units are
in the names; `_total` marks counters. Those of `counting` are the event loop's alone.
"""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Gauge, Histogram

from kvmesh.common import counting

# Seconds; those of OpenTelemetry's `gen_ai.server` conventions.
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
DURATION_BUCKETS = tuple(0.01 * 2**n for n in range(14))
TOKEN_BUCKETS = tuple(2**n for n in range(18))
FETCH_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
RPC_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


TIERS = ("device", "host", "nvme", "network")


def by_tier(counter: Counter) -> dict[str, Counter]:
    """The counters of a family whose one label is the tier."""
    return {tier: counter.labels(tier) for tier in TIERS}


class RpcMetrics:
    """Served RPCs; `method` is the full name, `code` the gRPC status."""

    def __init__(self, role: str) -> None:
        prefix = f"kvmesh_{role}_rpc"
        self.requests = counting.Counter(f"{prefix}_requests_total", "RPCs that ended", ["method", "code"])
        self.duration = counting.Histogram(
            f"{prefix}_duration_seconds", "from receipt to status", ["method"], buckets=RPC_BUCKETS
        )
        self.in_flight = counting.Gauge(f"{prefix}_in_flight", "RPCs running now", ["method"])
        # To find a label's metric costs more than to count.
        self.ended_as = cache(self.requests.labels)
        self.duration_of = cache(self.duration.labels)
        self.in_flight_of = cache(self.in_flight.labels)


class BusMetrics:
    """The connection to NATS."""

    def __init__(self, role: str) -> None:
        prefix = f"kvmesh_{role}_bus"
        self.connected = Gauge(f"{prefix}_connected", "1 while connected to NATS")
        self.connects = Counter(f"{prefix}_connects_total", "connections made, the first included")
        self.published = Counter(f"{prefix}_published_total", "messages handed to the connection")
        self.dropped = Counter(f"{prefix}_dropped_total", "messages given up: disconnected, or buffer full")
        self.received = Counter(f"{prefix}_received_total", "messages delivered to handlers")
        self.errors = Counter(f"{prefix}_errors_total", "errors reported by the client library")


class FrontendMetrics:
    """Requests as clients see them."""

    def __init__(self) -> None:
        p = "kvmesh_frontend"
        self.requests = counting.Counter(f"{p}_requests_total", "requests that ended", ["endpoint", "status"])
        self.in_flight = counting.Gauge(f"{p}_in_flight_requests", "requests running now", ["endpoint"])
        self.duration = counting.Histogram(
            f"{p}_request_duration_seconds",
            "from receipt to the last byte",
            ["endpoint"],
            buckets=DURATION_BUCKETS,
        )
        self.ttft = counting.Histogram(
            f"{p}_time_to_first_token_seconds", "from receipt to the first token", buckets=TTFT_BUCKETS
        )
        self.itl = counting.Histogram(
            f"{p}_inter_token_latency_seconds", "between tokens of a stream", buckets=ITL_BUCKETS
        )
        self.isl = counting.Histogram(f"{p}_input_sequence_tokens", "prompt lengths", buckets=TOKEN_BUCKETS)
        self.osl = counting.Histogram(f"{p}_output_sequence_tokens", "answer lengths", buckets=TOKEN_BUCKETS)
        self.prompt_tokens = counting.Counter(f"{p}_prompt_tokens_total", "tokens of prompts")
        self.output_tokens = counting.Counter(f"{p}_output_tokens_total", "tokens sent to clients")
        self.cached_tokens = counting.Counter(
            f"{p}_cached_tokens_total", "prompt tokens that were not computed", ["tier"]
        )
        self.cached_by_tier = by_tier(self.cached_tokens)
        self.disconnects = counting.Counter(
            f"{p}_disconnects_total", "clients that left before their answer was over"
        )
        self.retries = counting.Counter(f"{p}_retries_total", "placements tried again", ["reason"])
        self.continuations = counting.Counter(
            f"{p}_continuations_total", "answers that went on at another worker when theirs was lost"
        )


class TenantMetrics:
    """What tenants used; the tenant is empty where no keys are asked for."""

    def __init__(self) -> None:
        p, labels = "kvmesh_frontend_tenant", ["tenant", "model"]
        self.requests = counting.Counter(
            f"{p}_requests_total", "requests that were answered, in part at least", labels
        )
        self.prompt_tokens = counting.Counter(f"{p}_prompt_tokens_total", "tokens of their prompts", labels)
        self.cached_tokens = counting.Counter(f"{p}_cached_tokens_total", "of these, not computed", labels)
        self.output_tokens = counting.Counter(f"{p}_output_tokens_total", "tokens generated", labels)
        self.refused = counting.Counter(
            f"{p}_refused_total", "requests refused for their key or its limits", ["tenant", "reason"]
        )


class RouterMetrics:
    """Placements, leases and the index."""

    def __init__(self) -> None:
        p = "kvmesh_router"
        self.placements = counting.Counter(f"{p}_placements_total", "requests placed", ["policy", "mode"])
        # To find a label's metric costs more than to count.
        self.placed_by = cache(self.placements.labels)
        self.refusals = counting.Counter(f"{p}_refusals_total", "requests not placed", ["code"])
        self.decision = counting.Histogram(
            f"{p}_decision_seconds",
            "of computing, to place one request",
            buckets=(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 0.1, 1.0),
        )
        self.waited = counting.Histogram(
            f"{p}_waited_seconds",
            "from a request to its placement",
            buckets=(1e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
        )
        self.held = counting.Gauge(f"{p}_held_requests", "requests that wait for a worker")
        self.withdrawn = counting.Counter(f"{p}_withdrawn_total", "requests taken back while they waited")
        self.ttft_predicted = counting.Counter(
            f"{p}_ttft_predicted_seconds_total",
            "predicted from placement to first token, of those that had one",
        )
        self.ttft_actual = counting.Counter(
            f"{p}_ttft_actual_seconds_total", "what it really was, of the same"
        )
        self.ttft_error = counting.Histogram(
            f"{p}_ttft_error_seconds",
            "difference of the two, whatever its sign",
            buckets=(1e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
        )
        self.shadow_placements = counting.Counter(
            f"{p}_shadow_placements_total",
            "placements that a policy looked on at, and whether it would have made them",
            ["policy", "choice"],
        )
        self.shadow_cost = counting.Counter(
            f"{p}_shadow_cost_seconds_total",
            "predicted cost of the shadow's choices, and of the live ones; their difference is the regret",
            ["policy", "of"],
        )
        # Below 0 where the shadow's choice would have cost more.
        self.shadow_regret = counting.Histogram(
            f"{p}_shadow_regret_seconds",
            "predicted cost that the shadow's choice would have saved",
            ["policy"],
            buckets=(-1, -0.1, -0.01, -0.001, 0, 0.001, 0.01, 0.1, 1, 10),
        )
        self.shadow_ttft = counting.Counter(
            f"{p}_shadow_ttft_seconds_total", "predicted time to the first token, of both", ["policy", "of"]
        )
        self.log_lines = counting.Counter(
            f"{p}_decision_log_lines_total", "lines written to the decision log"
        )
        self.log_dropped = counting.Counter(
            f"{p}_decision_log_dropped_total", "lines that were not; the log says where"
        )
        self.log_failing = counting.Gauge(
            f"{p}_decision_log_failing", "models whose log could not be written last"
        )
        self.prompt_tokens = counting.Counter(f"{p}_prompt_tokens_total", "tokens of placed prompts")
        self.cached_tokens = counting.Counter(
            f"{p}_cached_tokens_total", "tokens expected in a tier of the chosen worker", ["tier"]
        )
        self.cached_by_tier = by_tier(self.cached_tokens)
        self.leases = counting.Gauge(f"{p}_leases", "leases held now")
        self.leaked_leases = counting.Gauge(
            f"{p}_leaked_leases", "held leases that nobody will end, and slots whose lease is gone; 0"
        )
        self.leases_ended = counting.Counter(f"{p}_leases_ended_total", "leases that ended", ["reason"])
        self.ended_by = cache(self.leases_ended.labels)
        self.unknown_leases = counting.Counter(f"{p}_unknown_leases_total", "reports on leases not held here")
        self.replicas = counting.Gauge(f"{p}_replicas", "other replicas that are heard")
        self.foreign_leases = counting.Gauge(
            f"{p}_foreign_leases", "leases of other replicas, counted with here"
        )
        self.replica_lag = counting.Gauge(
            f"{p}_replica_lag_seconds", "age of the oldest change that another replica has not acknowledged"
        )
        self.replica_messages = counting.Counter(
            f"{p}_replica_messages_total", "messages of other replicas, by what they showed", ["result"]
        )
        self.replica_resyncs = counting.Counter(
            f"{p}_replica_resyncs_total", "times all leases of a replica were asked for", ["why"]
        )
        self.replica_reports = counting.Counter(
            f"{p}_replica_reports_total",
            "reports on leases of other replicas: forwarded, taken by the owner, or dropped",
            ["result"],
        )
        self.replica_takeovers = counting.Counter(
            f"{p}_replica_takeovers_total", "leases taken over from replicas that were lost"
        )
        self.workers = counting.Gauge(f"{p}_workers", "workers by role and state", ["role", "state"])
        self.batches = counting.Counter(f"{p}_index_batches_total", "KV event batches", ["result"])
        self.gaps = counting.Counter(f"{p}_index_gaps_total", "gaps in the holders' sequences, each repaired")
        self.divergences = counting.Counter(
            f"{p}_index_divergences_total", "digests that showed an index unlike its holder, each repaired"
        )
        self.repairs = counting.Counter(
            f"{p}_index_repairs_total", "replays and snapshots asked for", ["by", "result"]
        )
        self.lag = counting.Gauge(
            f"{p}_index_behind_batches", "batches known of but not applied, over all holders"
        )
        self.index_blocks = counting.Gauge(f"{p}_index_blocks", "(block, holder, tier) entries")
        self.index_bytes = counting.Gauge(f"{p}_index_bytes", "memory of the prefix index")
        # The index counts; a counter of ours cannot be made to read that.
        self.index_forgotten = counting.Gauge(
            f"{p}_index_forgotten_blocks", "blocks forgotten at the memory cap since the start"
        )
        self.prefetches = counting.Counter(
            f"{p}_prefetches_total", "hints to stores to bring a placed prompt's blocks up", ["result"]
        )
        self.hints = counting.Counter(
            f"{p}_hints_total", "what requests say of their return, told to stores", ["result"]
        )
        self.index_holders = counting.Gauge(f"{p}_index_holders", "holders known", ["state"])


class WorkerMetrics:
    """One prefill, decode or aggregated worker."""

    def __init__(self, role: str) -> None:
        p = f"kvmesh_{role}"
        self.requests = Gauge(f"{p}_requests", "requests the engine runs or holds back")
        self.queued_requests = Gauge(f"{p}_queued_requests", "of these, not yet started")
        self.streams = Gauge(f"{p}_streams", "caller streams open now")
        self.blocks_total = Gauge(f"{p}_blocks_total", "blocks of the device pool")
        self.blocks_used = Gauge(f"{p}_blocks_used", "blocks live requests reference")
        self.blocks_cached = Gauge(f"{p}_blocks_cached", "cached blocks nobody references")
        self.transfers = Gauge(f"{p}_transfers", "KV transfers under way")
        self.prompt_tokens = Counter(f"{p}_prompt_tokens_total", "tokens of prompts")
        self.output_tokens = Counter(f"{p}_output_tokens_total", "tokens generated")
        self.cached_tokens = Counter(
            f"{p}_cached_tokens_total", "prompt tokens that were not computed", ["tier"]
        )
        self.transferred_bytes = Counter(f"{p}_transferred_bytes_total", "KV bytes handed over")
        self.store_pages = Counter(
            f"{p}_store_pages_total", "pages to and from the node's store, by what became of them", ["what"]
        )
        self.store_failed_loads = Counter(
            f"{p}_store_failed_loads_total",
            "loads from the store that failed; their requests are tried again",
        )
        self.finished = Counter(f"{p}_finished_total", "requests that ended", ["reason"])
        self.kv_events = Counter(f"{p}_kv_events_total", "KV events published", ["type"])
        self.kv_event_gaps = Counter(
            f"{p}_kv_event_gaps_total",
            "times the record was forgotten: events lost for good, or another engine",
            ["reason"],
        )
        self.kv_blocks = Gauge(f"{p}_kv_blocks", "blocks in the record of the engine's cache")


class KvbmMetrics:
    """A node's store, by tier."""

    def __init__(self) -> None:
        p = "kvmesh_kvbm"
        self.capacity_bytes = Gauge(f"{p}_capacity_bytes", "size of the tier", ["tier"])
        self.used_bytes = Gauge(f"{p}_used_bytes", "bytes of blocks held", ["tier"])
        self.blocks = Gauge(f"{p}_blocks", "blocks held", ["tier"])
        self.blocks_in_use = Gauge(f"{p}_blocks_in_use", "blocks being read or written", ["tier"])
        self.stored = Counter(f"{p}_stored_total", "blocks stored", ["tier"])
        self.loaded = Counter(f"{p}_loaded_total", "blocks loaded", ["tier"])
        self.evicted = Counter(f"{p}_evicted_total", "blocks evicted", ["tier", "reason"])
        self.lookups = Counter(f"{p}_lookups_total", "blocks looked up", ["tier"])
        self.hits = Counter(f"{p}_hits_total", "blocks found", ["tier"])
        self.misses = Counter(f"{p}_misses_total", "blocks not found", ["tier"])
        self.hinted = Counter(
            f"{p}_hinted_total", "chains used whose request had said something of its return", ["tier"]
        )
        self.host_bytes = Counter(f"{p}_host_bytes_total", "bytes of blocks stored and loaded", ["direction"])
        self.corrupt = Counter(f"{p}_corrupt_total", "blocks dropped for a wrong checksum", ["tier"])
        self.scrubbed = Counter(f"{p}_scrubbed_total", "blocks checked at rest", ["tier"])
        self.scrub_passes = Counter(f"{p}_scrub_passes_total", "passes over all of the tier", ["tier"])
        self.engines = Gauge(f"{p}_engines", "engines connected")
        self.pins = Gauge(f"{p}_pins", "pins held")
        self.pinned_bytes = Gauge(f"{p}_pinned_bytes", "bytes of pinned blocks")
        self.tenant_bytes = Gauge(
            f"{p}_tenant_bytes",
            "bytes of the host tier each tenant holds, where tenants have shares",
            ["tenant"],
        )
        self.nvme_up = Gauge(f"{p}_nvme_up", "whether the nvme tier works")
        self.nvme_coming = Gauge(f"{p}_nvme_coming", "blocks to be read back now")
        self.nvme_waiting = Gauge(
            f"{p}_nvme_waiting", "blocks to be written before memory has room again for what comes next"
        )
        self.nvme_outages = Counter(f"{p}_nvme_outages_total", "times the nvme tier was taken out")
        self.nvme_spilled = Counter(
            f"{p}_nvme_spilled_total", "blocks written before they left the host tier"
        )
        self.nvme_skipped = Counter(
            f"{p}_nvme_skipped_total", "blocks that left the host tier unwritten", ["reason"]
        )
        self.nvme_promoted = Counter(f"{p}_nvme_promoted_total", "blocks read back")
        self.nvme_failed = Counter(f"{p}_nvme_failed_total", "blocks that could not be read back")
        self.nvme_bytes = Counter(f"{p}_nvme_bytes_total", "bytes moved", ["direction"])
        self.network_fetched = Counter(
            f"{p}_network_fetched_total", "blocks read out of other stores' arenas"
        )
        self.network_bytes = Counter(f"{p}_network_bytes_total", "bytes of these")
        self.network_fetch = Histogram(
            f"{p}_network_fetch_seconds",
            "reading a batch out of another store's arena, and verifying it",
            buckets=FETCH_BUCKETS,
        )
        self.network_failed = Counter(
            f"{p}_network_failed_total", "blocks wanted from another store that did not come", ["reason"]
        )
        self.network_wanted = Counter(
            f"{p}_network_wanted_total", "blocks that engines asked for and only others had"
        )
        self.network_lent = Counter(f"{p}_network_lent_total", "blocks lent to other stores")
        self.network_lending = Gauge(f"{p}_network_lending", "blocks that other stores may be reading now")
        self.object_up = Gauge(f"{p}_object_up", "whether object storage works")
        self.object_waiting = Gauge(f"{p}_object_waiting", "blocks to be written to object storage now")
        self.object_outages = Counter(f"{p}_object_outages_total", "times object storage was taken out")
        self.object_written = Counter(f"{p}_object_written_total", "blocks written to object storage")
        self.object_skipped = Counter(
            f"{p}_object_skipped_total", "blocks stored in memory and not written there", ["reason"]
        )
        self.object_recalled = Counter(f"{p}_object_recalled_total", "blocks read back from there")
        self.object_missed = Counter(
            f"{p}_object_missed_total", "blocks wanted from there that did not come", ["reason"]
        )
        self.object_bytes = Counter(f"{p}_object_bytes_total", "bytes moved", ["direction"])
        self.prefetches_late = Counter(
            f"{p}_prefetches_late_total", "blocks of prefetches whose time was over before they were begun"
        )


rpc = cache(RpcMetrics)
bus = cache(BusMetrics)
frontend = cache(FrontendMetrics)
tenants = cache(TenantMetrics)
router = cache(RouterMetrics)
worker = cache(WorkerMetrics)
kvbm = cache(KvbmMetrics)
