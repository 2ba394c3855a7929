"""An engine's KV events on the bus: what the engine tells becomes the worker's stream of batches."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator

from kvmesh.common.bus import Bus
from kvmesh.common.events.publication import Chain, Publication
from kvmesh.common.metrics import WorkerMetrics
from kvmesh.engine.contract import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from kvmesh.engine.worker.record import BlockRecord
from kvmesh.v1.common_pb2 import Tier

_DEVICE = Tier.TIER_DEVICE


class KvPublisher:
    """Follows one engine and keeps the record of its blocks; `publication` serves both."""

    def __init__(self, bus: Bus, holder_id: str, incarnation: int, node: str, metrics: WorkerMetrics) -> None:
        self._record = BlockRecord()
        self.publication = Publication(bus, holder_id, incarnation, node, self._chains, engine=True)
        self._stored = metrics.kv_events.labels("stored")
        self._removed = metrics.kv_events.labels("removed")
        self._cleared = metrics.kv_events.labels("cleared")
        self._metrics = metrics
        metrics.kv_blocks.set_function(lambda: len(self._record))

    async def follow(self, events: AsyncIterator[list[KvEvent]]) -> None:
        """Publish the engine's events until cancelled."""
        self.publication.start()
        async for step in events:
            self.take(step)

    def take(self, events: Iterable[KvEvent]) -> None:
        """Record the engine's next events, and publish them soon."""
        record, publication = self._record, self.publication
        stored = removed = 0
        for event in events:
            record.apply(event)
            match event:
                case BlocksStored(hashes, parent):
                    stored += 1
                    publication.stored(_DEVICE, hashes, parent)
                case BlocksRemoved(hashes):
                    removed += 1
                    publication.removed(_DEVICE, hashes)
                case BlocksCleared(reason):
                    self._cleared.inc()
                    if reason:
                        self._metrics.kv_event_gaps.labels(reason).inc()
                    publication.cleared(_DEVICE)
        # Once a step, not once an event: counting costs as much as the rest.
        if stored:
            self._stored.inc(stored)
        if removed:
            self._removed.inc(removed)
        publication.flush_soon()

    async def close(self) -> None:
        """Publish what is pending and stop."""
        await self.publication.close()

    def _chains(self) -> Iterator[Chain]:
        return ((_DEVICE, chain.hashes, chain.parent) for chain in self._record.chains())
