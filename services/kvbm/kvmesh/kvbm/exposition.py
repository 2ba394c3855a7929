"""The store's numbers as Prometheus metrics, and the troubles of its lower tiers in the log."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict

import structlog
from prometheus_client import REGISTRY, Counter

from kvmesh.common import metrics
from kvmesh.core import StoreServer
from kvmesh.kvbm.fetching import REASONS, Fetching
from kvmesh.kvbm.latencies import Latencies
from kvmesh.kvbm.lending import Lending

log = structlog.get_logger()

INTERVAL_S = 1.0
_SKIPPED = ("shed", "unlikely", "over_budget", "unplaced")


class Exposition:
    """Copies the store's gauges and totals to its metrics once a second. Belongs to one event loop."""

    def __init__(self, store: StoreServer, lending: Lending, fetching: Fetching) -> None:
        self._store = store
        self._lending = lending
        self._fetching = fetching
        self._metrics = metrics.kvbm()
        # The store counts from its own start; Prometheus counters only take increments.
        self._last: defaultdict[tuple[int, tuple[str, ...]], int] = defaultdict(int)
        self._problem: str | None = None
        self._object_problem: str | None = None
        self._latencies = Latencies(store)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        REGISTRY.register(self._latencies)
        self._task = asyncio.create_task(self._run(), name="store-metrics")

    async def close(self) -> None:
        if self._task is not None:
            REGISTRY.unregister(self._latencies)
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def _run(self) -> None:
        while True:
            self.update()
            await asyncio.sleep(INTERVAL_S)

    def update(self) -> None:
        """Bring the metrics up to now."""
        exported = self._metrics
        exported.engines.set(self._store.engines)
        pins, pinned_bytes = self._store.pinned
        exported.pins.set(pins)
        exported.pinned_bytes.set(pinned_bytes)
        for tenant, held in self._store.tenant_bytes().items():
            exported.tenant_bytes.labels(tenant).set(held)
        for tier in self._store.tiers:
            now = self._store.stats(tier)
            exported.capacity_bytes.labels(tier).set(now["capacity_bytes"])
            exported.used_bytes.labels(tier).set(now["used_bytes"])
            exported.blocks.labels(tier).set(now["blocks"])
            exported.blocks_in_use.labels(tier).set(now["blocks_in_use"])
            self._count(exported.stored, now["stored"], tier)
            self._count(exported.loaded, now["loaded"], tier)
            for reason, total in now["evicted"].items():
                self._count(exported.evicted, total, tier, reason)
            self._count(exported.lookups, now["lookups"], tier)
            self._count(exported.hits, now["hits"], tier)
            self._count(exported.misses, now["lookups"] - now["hits"], tier)
            self._count(exported.hinted, now["hinted"], tier)
            self._count(exported.corrupt, now["corrupt"], tier)
        memory = self._store.stats()
        self._count(exported.host_bytes, memory["stored_bytes"], "stored")
        self._count(exported.host_bytes, memory["loaded_bytes"], "loaded")
        for tier, scrubbed in self._store.scrubbed().items():
            self._count(exported.scrubbed, scrubbed["blocks"], tier)
            self._count(exported.scrub_passes, scrubbed["passes"], tier)
        self._update_nvme()
        self._update_objects()
        self._update_network()

    def _update_nvme(self) -> None:
        flow, exported = self._store.flow(), self._metrics
        if flow is None:
            return
        exported.nvme_up.set(flow["problem"] is None)
        exported.nvme_coming.set(flow["coming"])
        exported.nvme_waiting.set(flow["waiting"])
        self._count(exported.nvme_outages, flow["outages"])
        self._count(exported.nvme_spilled, flow["spilled"])
        for reason in _SKIPPED:
            self._count(exported.nvme_skipped, flow[reason], reason)
        self._count(exported.nvme_promoted, flow["promoted"])
        self._count(exported.nvme_failed, flow["failed"])
        self._count(exported.nvme_bytes, flow["written_bytes"], "written")
        self._count(exported.nvme_bytes, flow["read_bytes"], "read")
        self._count(exported.prefetches_late, flow["late"])
        if flow["problem"] != self._problem:
            self._problem = flow["problem"]
            if self._problem is None:
                log.info("nvme tier is back", blocks=flow["recovered"], io=flow["io"])
            else:
                log.error("nvme tier is out; going on without it, and trying again", problem=self._problem)

    def _update_objects(self) -> None:
        flow, exported = self._store.objects(), self._metrics
        if flow is None:
            return
        exported.object_up.set(flow["problem"] is None)
        exported.object_waiting.set(flow["waiting"])
        self._count(exported.object_outages, flow["outages"])
        self._count(exported.object_written, flow["written"])
        self._count(exported.object_recalled, flow["recalled"])
        for reason, blocks in flow["skipped"].items():
            self._count(exported.object_skipped, blocks, reason)
        for reason, blocks in flow["missed"].items():
            self._count(exported.object_missed, blocks, reason)
        self._count(exported.object_bytes, flow["written_bytes"], "written")
        self._count(exported.object_bytes, flow["read_bytes"], "read")
        if flow["problem"] != self._object_problem:
            self._object_problem = flow["problem"]
            if self._object_problem is None:
                log.info("object storage is back", url=flow["url"], blocks=flow["recovered"])
            else:
                log.error(
                    "object storage is out; going on without it, and trying again",
                    url=flow["url"],
                    problem=self._object_problem,
                )

    def _update_network(self) -> None:
        exported, fetching = self._metrics, self._fetching
        exported.network_lending.set(self._lending.blocks)
        self._count(exported.network_lent, self._lending.total)
        self._count(exported.network_fetched, fetching.fetched)
        self._count(exported.network_bytes, fetching.fetched_bytes)
        wanted, shed = self._store.wanted_total
        self._count(exported.network_wanted, wanted)
        for reason in REASONS:
            also = shed if reason == "shed" else 0
            self._count(exported.network_failed, fetching.failed[reason] + also, reason)

    def _count(self, counter: Counter, total: int, *labels: str) -> None:
        key = (id(counter), labels)
        (counter.labels(*labels) if labels else counter).inc(total - self._last[key])
        self._last[key] = total
