"""The store's changes on the bus: what the store's journal gives becomes the store's stream of batches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import structlog

from kvmesh.common.bus import Bus
from kvmesh.common.events.columns import STORE_TIERS
from kvmesh.common.events.publication import Chain, Publication
from kvmesh.core import StoreServer

log = structlog.get_logger()

# How long the waiting thread stays in one wait; it also ends when the publisher closes.
WAIT_S = 3600.0
# Changes of a burst share a batch: after one, the next comes this much later at the earliest.
MIN_INTERVAL_S = 0.002
_TIERS = {name: tier for tier, name in STORE_TIERS.items()}

# As `StoreServer.drain_changes` gives them.
Change = tuple[str, int | None, list[int]]


class StorePublisher:
    """Publishes the changes of all tiers of one store as holder `holder_id`. Belongs to one event loop.

    Changes are drained and numbered on the loop alone, so that a snapshot and the batches around it agree.
    """

    def __init__(
        self, store: StoreServer, bus: Bus, holder_id: str, incarnation: int, node: str, address: str
    ) -> None:
        self._store = store
        self._closing = False
        self._following: list[asyncio.Task[None]] = []
        self.publication = Publication(
            bus, holder_id, incarnation, node, self._chains, engine=False, address=address
        )

    def start(self) -> None:
        """Publish changes as they come, until `close`."""
        self.publication.start()
        self._following = [
            asyncio.create_task(self._follow(tier), name=f"{tier}-changes") for tier in self._store.tiers
        ]

    async def close(self) -> None:
        """Publish what is pending and stop. Idempotent."""
        self._closing = True
        self._store.wake()
        if self._following:
            await asyncio.gather(*self._following)
            self._following = []
            for tier in self._store.tiers:
                self._take(tier, self._store.drain_changes(tier))
        await self.publication.close()

    async def _follow(self, tier: str) -> None:
        while not self._closing:
            if await asyncio.to_thread(self._store.wait_changes, WAIT_S, tier):
                self._take(tier, self._store.drain_changes(tier))
                self.publication.flush()
                await asyncio.sleep(MIN_INTERVAL_S)

    def _chains(self) -> Iterator[Chain]:
        """The store's blocks now; what happened before is pending in the publication then."""
        chains: list[Chain] = []
        for tier in self._store.tiers:
            pending, state = self._store.snapshot(tier)
            if _lost(pending):
                self._restate(tier, state)
            else:
                self._take(tier, pending)
            chains += ((_TIERS[tier], hashes, parent) for _, parent, hashes in state)
        return iter(chains)

    def _take(self, tier: str, changes: list[Change]) -> None:
        if _lost(changes):
            # What is pending in a snapshot has happened before it, so the state alone tells all.
            self._restate(tier, self._store.snapshot(tier)[1])
            return
        for kind, parent, hashes in changes:
            if kind == "stored":
                self.publication.stored(_TIERS[tier], hashes, parent)
            else:
                self.publication.removed(_TIERS[tier], hashes)

    def _restate(self, tier: str, state: list[Change]) -> None:
        """Publish the whole state of a tier in place of changes that were not kept."""
        log.warning("changes came faster than they could be published; publishing the whole state", tier=tier)
        self.publication.cleared(_TIERS[tier])
        for _, parent, hashes in state:
            self.publication.stored(_TIERS[tier], hashes, parent)


def _lost(changes: list[Change]) -> bool:
    return any(kind == "lost" for kind, _, _ in changes)
