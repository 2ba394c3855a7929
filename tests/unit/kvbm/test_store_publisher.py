"""The store's stream of batches when its journal did not keep everything."""

from __future__ import annotations

from random import Random
from typing import cast

from fixtures.faulty import Faults, FaultyHub, Rates
from fixtures.waiting import eventually
from kvmesh.common.bus import Bus
from kvmesh.common.events.columns import Kind, read
from kvmesh.core import StoreServer
from kvmesh.kvbm.publisher import Change, StorePublisher
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.events_pb2 import KvEventBatch


class Journal:
    """A store whose changes a test says; more than a million of them are too many for the real one."""

    tiers = ("nvme",)

    def __init__(self) -> None:
        self.pending: list[Change] = []
        self.state: list[Change] = []

    def drain_changes(self, tier: str) -> list[Change]:
        assert tier == "nvme"
        pending, self.pending = self.pending, []
        return pending

    def snapshot(self, tier: str) -> tuple[list[Change], list[Change]]:
        return self.drain_changes(tier), self.state

    def wait_changes(self, timeout_s: float, tier: str) -> bool:
        return bool(self.pending)

    def wake(self) -> None: ...


async def test_lost_changes_are_replaced_by_the_whole_state() -> None:
    hub = FaultyHub(Faults(Random(1), Rates()))
    reader = hub.bus()
    batches: list[KvEventBatch] = []
    await reader.subscribe("*", lambda _, payload: batches.append(KvEventBatch.FromString(payload)))
    store = Journal()
    publisher = StorePublisher(cast(StoreServer, store), cast(Bus, hub.bus()), "kvbm-0", 1, "node-a", "")
    store.pending = [("stored", None, [1, 2])]
    publisher.start()
    await eventually(lambda: len(batches) == 1)
    store.state = [("stored", None, [7, 8]), ("stored", 8, [9])]
    store.pending = [("lost", None, [])]
    await eventually(lambda: len(batches) == 2)
    assert [(event.kind, event.tier, event.hashes.tolist()) for event in read(batches[1])] == [
        (Kind.CLEARED, Tier.TIER_NVME, []),
        (Kind.STORED_ROOT, Tier.TIER_NVME, [7, 8]),
        (Kind.STORED, Tier.TIER_NVME, [9]),
    ]
    assert [digest.count for digest in batches[1].digests] == [0, 3, 0]
    # A snapshot that meets the loss tells it first, and follows it.
    store.pending = [("lost", None, [])]
    (snapshot,) = publisher.publication.snapshot()
    assert snapshot.sequence == batches[-1].sequence == 3
    assert list(snapshot.hashes) == [7, 8, 9]
    assert snapshot.digests == batches[-1].digests
    await publisher.close()
