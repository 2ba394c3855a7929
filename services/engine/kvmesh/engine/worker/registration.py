"""What a worker says of itself, at every heartbeat and when asked."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator

from prometheus_client import Counter

from kvmesh.common.config import Config
from kvmesh.common.errors import invalid
from kvmesh.common.metrics import WorkerMetrics
from kvmesh.core import REASONING_FORMATS, TOOL_FORMATS
from kvmesh.engine.contract import Engine, EngineInfo, EngineLoad, Probe, Role, StoreTraffic
from kvmesh.engine.model import ModelSource
from kvmesh.engine.worker.wire import write_load, write_probe
from kvmesh.v1 import common_pb2

_ROLES = {
    Role.PREFILL: common_pb2.ROLE_PREFILL,
    Role.DECODE: common_pb2.ROLE_DECODE,
    Role.AGGREGATED: common_pb2.ROLE_AGGREGATED,
}
# What NATS takes as a key and as one part of a subject.
_ID = re.compile(r"[A-Za-z0-9_-]+")


def worker_id(config: Config, role: Role) -> str:
    """The configured id, or one made of role, host name and process id.

    Raises KvmeshError(INVALID_ARGUMENT) for an id that cannot be part of a bus subject.
    """
    configured = config.worker.id
    if not configured:
        return re.sub(r"[^A-Za-z0-9_-]", "-", f"{role}-{socket.gethostname()}-{os.getpid()}")
    if not _ID.fullmatch(configured):
        raise invalid(f"`worker.id` {configured!r} may hold letters, digits, `-` and `_` only")
    return configured


def _format(key: str, name: str, known: list[str]) -> str:
    """As registrations name it."""
    if name == "auto":
        return ""
    if name != "none" and name not in known:
        raise invalid(f"`{key}` {name!r} is not known; one of: auto, none, {', '.join(known)}")
    return name


def _capabilities(info: EngineInfo) -> list[common_pb2.Capability]:
    if info.embedding_size:
        return [common_pb2.CAPABILITY_EMBED]
    # The contract asks log probabilities of every engine that generates.
    able = [common_pb2.CAPABILITY_GENERATE, common_pb2.CAPABILITY_LOGPROBS]
    return [*able, common_pb2.CAPABILITY_CONSTRAIN] if info.constraints else able


class Registration:
    """The worker's `WorkerInfo`, kept up to date, with the load of the moment it is taken."""

    def __init__(
        self, config: Config, role: Role, worker_id: str, incarnation: int, metrics: WorkerMetrics
    ) -> None:
        """Raises KvmeshError(INVALID_ARGUMENT) for a format of calls or reasoning that is not known."""
        self._config = config
        self._formats = (
            _format("model.tool_format", config.model.tool_format, TOOL_FORMATS),
            _format("model.reasoning_format", config.model.reasoning_format, REASONING_FORMATS),
        )
        self._metrics = metrics
        self._engine: Engine | None = None
        self._counted = EngineLoad()
        self._info = common_pb2.WorkerInfo(
            id=worker_id,
            incarnation=incarnation,
            role=_ROLES[role],
            engine=config.engine.kind,
            state=common_pb2.WORKER_STATE_STARTING,
            node=config.node,
            pid=os.getpid(),
        )

    def listening(self, address: str) -> None:
        self._info.address = address

    def ready(self, engine: Engine, info: EngineInfo, model: ModelSource, probe: Probe) -> None:
        """The engine answers: say what it is, and how fast."""
        self._engine = engine
        self._info.model.CopyFrom(
            common_pb2.ModelInfo(
                name=model.name,
                path=model.path,
                context_length=info.context_length,
                vocab_size=info.vocab_size,
                eos_token_ids=info.eos_token_ids,
                aliases=self._config.model.aliases,
                tool_format=self._formats[0],
                reasoning_format=self._formats[1],
                capabilities=_capabilities(info),
                adapters=info.adapters,
                embedding_size=info.embedding_size,
                # One of several may share its tokenizer, and the node's store, with another.
                cache_salt=f"model:{model.name}" if self._config.models else "",
            )
        )
        self._info.kv.CopyFrom(
            common_pb2.KvInfo(
                page_size=info.page_size, total_blocks=info.total_blocks, block_bytes=info.block_bytes
            )
        )
        self._info.device, self._info.pass_tokens = info.device, info.pass_tokens
        self._info.probe.CopyFrom(write_probe(probe))
        if info.bootstrap_port:
            self._info.bootstrap.CopyFrom(
                common_pb2.BootstrapAddress(host=info.bootstrap_host, port=info.bootstrap_port)
            )
        self._info.state = common_pb2.WORKER_STATE_READY
        self._expose(engine, info)

    def draining(self) -> None:
        self._info.state = common_pb2.WORKER_STATE_DRAINING

    def info(self) -> common_pb2.WorkerInfo:
        """A copy with the present load."""
        if self._engine is not None:
            load = self._engine.load()
            self._info.load.CopyFrom(write_load(load))
            self._count(load)
        info = common_pb2.WorkerInfo()
        info.CopyFrom(self._info)
        return info

    def _expose(self, engine: Engine, info: EngineInfo) -> None:
        # Read when scraped: gauges that are written cost something even if nobody looks.
        metrics = self._metrics
        metrics.blocks_total.set(info.total_blocks)
        metrics.requests.set_function(lambda: engine.load().requests)
        metrics.queued_requests.set_function(lambda: engine.load().queued_requests)
        metrics.blocks_used.set_function(lambda: engine.load().blocks_used)
        metrics.blocks_cached.set_function(lambda: engine.load().blocks_cached)
        metrics.transfers.set_function(lambda: engine.load().transfers)

    def _count(self, load: EngineLoad) -> None:
        """Counters follow the engine's totals, which may have been reset with the engine."""
        counted = self._counted
        for counter, now, before in (
            (self._metrics.prompt_tokens, load.prompt_tokens_total, counted.prompt_tokens_total),
            (self._metrics.output_tokens, load.output_tokens_total, counted.output_tokens_total),
            (self._metrics.transferred_bytes, load.transferred_bytes_total, counted.transferred_bytes_total),
            *self._store_counts(load.store, counted.store),
        ):
            counter.inc(now - before if now >= before else now)
        self._counted = EngineLoad(
            prompt_tokens_total=load.prompt_tokens_total,
            output_tokens_total=load.output_tokens_total,
            transferred_bytes_total=load.transferred_bytes_total,
            store=load.store,
        )

    def _store_counts(self, now: StoreTraffic, before: StoreTraffic) -> Iterator[tuple[Counter, int, int]]:
        for what in ("offloaded", "refused", "shed", "loaded"):
            yield self._metrics.store_pages.labels(what), getattr(now, what), getattr(before, what)
        yield self._metrics.store_failed_loads, now.failed_loads, before.failed_loads
