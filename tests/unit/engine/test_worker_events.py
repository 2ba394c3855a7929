"""The worker's record of its engine's blocks, and what it publishes of it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, cast

import pytest

from fixtures.waiting import eventually
from kvmesh.common import metrics
from kvmesh.common.bus import Bus
from kvmesh.common.errors import KvmeshError
from kvmesh.common.events import publication as module
from kvmesh.common.events.columns import MAX_HASHES, Kind, read, read_digest
from kvmesh.common.events.publication import Publication
from kvmesh.core import PrefixIndex
from kvmesh.engine.contract import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from kvmesh.engine.worker.publisher import KvPublisher
from kvmesh.engine.worker.record import BlockRecord
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.events_pb2 import KvEventBatch


class Recorder:
    """Stands where the bus is, and keeps what is published."""

    def __init__(self) -> None:
        self.batches: list[KvEventBatch] = []
        self.sizes: list[int] = []
        self.headers: list[dict[str, str]] = []
        self.reconnected: Callable[[], None] = lambda: None

    def publish(self, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        assert subject == "kvmesh.kv.w-0"
        self.sizes.append(len(payload))
        self.headers.append(headers)
        self.batches.append(KvEventBatch.FromString(payload))

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self.reconnected = callback


class Source:
    """The part of an engine that tells events."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[list[KvEvent]] = asyncio.Queue()

    async def kv_events(self) -> AsyncIterator[list[KvEvent]]:
        while True:
            yield await self.queue.get()


class Harness:
    def __init__(self) -> None:
        self.bus = Recorder()
        self.source = Source()
        self.publisher = KvPublisher(cast(Bus, self.bus), "w-0", 77, "node-1", metrics.worker("aggregated"))
        self.task = asyncio.create_task(self.publisher.follow(self.source.kv_events()))

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.publisher.close()

    async def tell(self, *events: KvEvent) -> None:
        self.source.queue.put_nowait(list(events))
        await eventually(self.source.queue.empty)
        await asyncio.sleep(0)


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    harness = Harness()
    yield harness
    await harness.close()


def apply(blocks: set[int], batches: Iterable[KvEventBatch]) -> set[int]:
    """What a reader of the batches holds in the end; checks every digest on the way."""
    for batch in batches:
        for kind, tier, hashes, _ in read(batch):
            assert tier == Tier.TIER_DEVICE
            match kind:
                case Kind.REMOVED:
                    blocks -= set(hashes.tolist())
                case Kind.CLEARED:
                    blocks.clear()
                case _:
                    blocks |= set(hashes.tolist())
        for digest in batch.digests:
            index = PrefixIndex()
            index.store(index.add_engine("reader"), list(blocks))
            assert digest.tier == Tier.TIER_DEVICE
            assert read_digest(digest) == index.digest(0)
    return blocks


def test_record_gives_its_blocks_in_runs() -> None:
    record = BlockRecord()
    record.apply(BlocksStored([1, 2, 3]))
    record.apply(BlocksStored([4, 5], 2))
    record.apply(BlocksStored([9]))
    chains = record.chains()
    record.apply(BlocksRemoved([5, 77]))
    assert list(chains) == [BlocksStored([1, 2, 3], None), BlocksStored([4, 5], 2), BlocksStored([9], None)]
    assert len(record) == 5
    record.apply(BlocksCleared())
    assert list(record.chains()) == []


async def test_events_become_numbered_batches(harness: Harness) -> None:
    await harness.tell(BlocksStored([1, 2], None), BlocksStored([3], 2))
    await harness.tell(BlocksRemoved([3]))
    await eventually(lambda: len(harness.bus.batches) == 2)
    first, second = harness.bus.batches
    assert (first.holder_id, first.incarnation, first.node) == ("w-0", 77, "node-1")
    assert (first.sequence, second.sequence) == (1, 2)
    assert [(event.kind, event.parent) for event in read(first)] == [
        (Kind.STORED_ROOT, None),
        (Kind.STORED, 2),
    ]
    (removed,) = read(second)
    assert (removed.kind, removed.hashes.tolist()) == (Kind.REMOVED, [3])
    assert [digest.count for batch in (first, second) for digest in batch.digests] == [3, 2]
    assert first.traceparent == harness.bus.headers[0]["traceparent"]
    assert len(first.traceparent) == 55


async def test_a_burst_shares_a_batch(harness: Harness) -> None:
    for block in range(100):
        harness.source.queue.put_nowait([BlocksStored([block], None)])
    await eventually(lambda: len(apply(set(), harness.bus.batches)) == 100)
    assert len(harness.bus.batches) < 60


async def test_batches_stay_below_what_the_bus_takes(harness: Harness) -> None:
    huge = list(range(1, 3 * MAX_HASHES))
    await harness.tell(BlocksStored(huge, None))
    await harness.tell(*(BlocksStored([10**9 + n], None) for n in range(MAX_HASHES // 2)))
    await harness.tell(BlocksRemoved(huge[5:]))
    await eventually(lambda: len(apply(set(), harness.bus.batches)) == 5 + MAX_HASHES // 2)
    assert max(harness.bus.sizes) < 1_000_000
    first, second = harness.bus.batches[:2]
    assert next(read(second)).parent == next(read(first)).hashes[-1]


async def test_snapshots_fit_into_the_sequence(harness: Harness) -> None:
    chance = random.Random(3)
    known: list[int] = []
    for _ in range(60):
        if known and chance.random() < 0.3:
            await harness.tell(BlocksRemoved([known.pop(chance.randrange(len(known)))]))
        else:
            new = [chance.getrandbits(64) for _ in range(chance.randint(1, 5))]
            known += new
            await harness.tell(BlocksStored(new, None))
        if chance.random() < 0.3:
            snapshot = list(harness.publisher.publication.snapshot())
            assert [len(part.digests) for part in snapshot] == [0] * (len(snapshot) - 1) + [1]
            after = [batch for batch in harness.bus.batches if batch.sequence > snapshot[-1].sequence]
            assert apply(apply(set(), snapshot), after) == set(known)
            assert apply(set(), harness.bus.batches) == set(known)
    sequences = [batch.sequence for batch in harness.bus.batches]
    assert sequences == list(range(1, len(sequences) + 1))


async def test_an_empty_snapshot_still_says_where_it_stands(harness: Harness) -> None:
    (batch,) = harness.publisher.publication.snapshot()
    assert (batch.sequence, len(batch.ops), batch.digests[0].count) == (0, 0, 0)


async def test_large_snapshots_come_in_parts(harness: Harness) -> None:
    blocks = list(range(3 * module.SNAPSHOT_BLOCKS))
    await harness.tell(BlocksStored(blocks[::2], None), *(BlocksStored([n], None) for n in blocks[1::2]))
    parts = list(harness.publisher.publication.snapshot())
    assert len(parts) >= 3
    assert len({part.sequence for part in parts}) == 1
    assert apply(set(), parts) == set(blocks)


async def test_replays_are_what_was_published(harness: Harness) -> None:
    for block in range(10):
        await harness.tell(BlocksStored([block], None))
        harness.publisher.publication.flush()
    publication = harness.publisher.publication
    assert publication.replay(77, 4) == harness.bus.batches[3:]
    assert publication.replay(77, 11) == []
    for incarnation, first in ((78, 4), (77, 12), (77, 0)):
        with pytest.raises(KvmeshError, match="take a snapshot"):
            publication.replay(incarnation, first)


async def test_the_oldest_batches_are_not_kept(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", 5000)
    publication = harness.publisher.publication
    for block in range(30):
        publication.stored(Tier.TIER_DEVICE, [block], None)
        publication.flush()
    kept = next(first for first in range(1, 32) if _kept(publication, first))
    assert 20 < kept < 31
    assert publication.replay(77, kept) == harness.bus.batches[kept - 1 :]


async def test_what_is_more_than_the_blocks_is_not_replayed(harness: Harness) -> None:
    publication = harness.publisher.publication

    def churn() -> None:
        for _ in range(3000):
            publication.stored(Tier.TIER_DEVICE, [1], None)
            publication.removed(Tier.TIER_DEVICE, [1])
            publication.flush()

    churn()
    assert len(publication.replay(77, 2001)) == 1000
    with pytest.raises(KvmeshError, match="more than w-0's 0 blocks; take a snapshot"):
        publication.replay(77, 1)
    # The same for a holder of many blocks is worth it.
    publication.stored(Tier.TIER_DEVICE, range(2, 100_000), None)
    publication.flush()
    before = publication.sequence
    churn()
    assert len(publication.replay(77, before + 1)) == 3000


def _kept(publication: Publication, first: int) -> bool:
    try:
        publication.replay(77, first)
    except KvmeshError:
        return False
    return True


async def test_forgetting_is_told_and_counted(harness: Harness) -> None:
    gaps = metrics.worker("aggregated").kv_event_gaps.labels("lost")
    before = gaps._value.get()
    await harness.tell(BlocksStored([1, 2], None))
    await harness.tell(BlocksCleared("lost"), BlocksStored([3], None))
    harness.publisher.publication.flush()
    assert apply(set(), harness.bus.batches) == {3}
    assert gaps._value.get() == before + 1


async def test_reconnections_and_pauses_are_announced(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.05)
    await harness.tell(BlocksStored([1], None))
    before = len(harness.bus.batches)
    harness.bus.reconnected()
    assert len(harness.bus.batches) == before + 1
    await eventually(lambda: len(harness.bus.batches) >= before + 3)
    assert not harness.bus.batches[-1].ops
    assert harness.bus.batches[-1].digests[0].count == 1
    sequences: list[Any] = [batch.sequence for batch in harness.bus.batches]
    assert sequences == list(range(1, len(sequences) + 1))
