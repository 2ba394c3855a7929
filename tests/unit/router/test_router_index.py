"""The index equals what holders hold: real NATS, real snapshots over gRPC, the real Rust index."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random

import pytest

from fixtures.holders import Holder, Members, is_live, worker_info
from fixtures.nats import NatsServer
from fixtures.waiting import eventually
from kvmesh.common.bus import Bus
from kvmesh.common.grpc.client import Channels
from kvmesh.core import PrefixIndex
from kvmesh.router import index as index_module
from kvmesh.router.index import IndexFeed
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.events_pb2 import KvEventBatch


def match(feed: IndexFeed, hashes: list[int]) -> dict[str, tuple[int, int, int, int]]:
    """Leading blocks each worker sees, by tier, cumulated."""
    names = {holder.index_id: holder.id for holder in feed._holders.values()}
    return (
        {names[index_id]: depths for index_id, depths in feed.index.match(hashes).items()} if hashes else {}
    )


class World:
    """An index fed from any number of holders."""

    def __init__(self, nats: NatsServer) -> None:
        self.nats = nats
        self.bus = Bus(nats.url, "router")
        self.publisher = Bus(nats.url, "holders")
        self.channels = Channels()
        self.members = Members()
        self.holders: list[Holder] = []
        self.feed = self.make_feed()

    def make_feed(self, **store: str) -> IndexFeed:
        return IndexFeed(PrefixIndex(), self.members, self.bus, self.channels, **store)

    async def start(self) -> None:
        await self.bus.start()
        await self.publisher.start()
        await self.feed.start()
        await eventually(lambda: self.bus.connected and self.publisher.connected)
        # What is published now arrives: the server has the subscription.
        assert self.bus.client is not None
        await self.bus.client.flush()

    async def worker(self, worker_id: str, node: str = "node-a", *, join: bool = True) -> Holder:
        holder = Holder(worker_id, self.publisher, node=node)
        await holder.serve()
        self.holders.append(holder)
        if join:
            self.join(holder)
            await eventually(lambda: is_live(self.feed, worker_id))
        return holder

    def join(self, holder: Holder) -> None:
        """The holder's registration, as it is now, reaches the router."""
        assert holder.server is not None
        self.members.put(
            worker_info(
                holder.id, incarnation=holder.incarnation, address=holder.server.address, node=holder.node
            )
        )

    def equal(self) -> bool:
        """Whether the index holds exactly each holder's blocks."""
        return all(
            is_live(self.feed, holder.id)
            and self.feed.blocks_of(holder.id) == len(holder.blocks)
            and all(
                match(self.feed, [block]).get(holder.id, (0,))[0] == 1
                for block in holder.blocks
                if holder.tier == Tier.TIER_DEVICE
            )
            for holder in self.holders
        )

    async def close(self) -> None:
        await self.feed.close()
        await self.channels.close()
        for holder in self.holders:
            await holder.stop()
        await self.publisher.close()
        await self.bus.close()


@pytest.fixture
async def world(nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(index_module, "RETRY_S", (0.02, 0.2))
    world = World(nats)
    yield world
    await world.close()


async def test_live_events(world: World) -> None:
    await world.start()
    worker = await world.worker("a")
    worker.store([1, 2, 3])
    worker.store([4], parent=3)
    await eventually(lambda: match(world.feed, [1, 2, 3, 4]) == {"a": (4, 4, 4, 4)})
    worker.remove([2])
    await eventually(lambda: match(world.feed, [1, 2, 3, 4]) == {"a": (1, 1, 1, 1)})
    worker.clear()
    await eventually(lambda: match(world.feed, [1]) == {})
    assert match(world.feed, []) == {}
    assert world.feed.gaps_total == 0


async def test_a_worker_that_was_there_before(world: World) -> None:
    worker = await world.worker("a", join=False)
    await world.start()
    worker.store(range(1, 100))
    await asyncio.sleep(0.05)
    world.join(worker)
    await eventually(world.equal)
    worker.store([100])
    await eventually(world.equal)


async def test_a_lost_batch_is_repaired_by_a_replay(world: World) -> None:
    await world.start()
    worker = await world.worker("a")
    worker.store([1])
    await eventually(world.equal)
    asked = worker.snapshots, worker.replays
    worker.bus.lose = 1
    worker.store([2])
    worker.store([3])
    await eventually(world.equal)
    assert world.feed.gaps_total == 1
    assert (worker.snapshots, worker.replays) == (asked[0], asked[1] + 1)


async def test_behind_a_gap_the_index_is_what_the_worker_had(world: World) -> None:
    await world.start()
    worker = await world.worker("a")
    worker.store([1, 2])
    await eventually(world.equal)
    # Nobody to ask for what is missing.
    assert worker.server is not None
    await worker.server.stop(0)
    worker.bus.lose = 1
    worker.remove([2])
    worker.store([3])
    await eventually(lambda: world.feed.behind() == 2)
    assert not is_live(world.feed, "a")
    assert match(world.feed, [1, 2]) == {"a": (2, 2, 2, 2)}
    assert match(world.feed, [3]) == {}, "no batch is applied without the one before it"
    await worker.serve(worker.server.port)
    await eventually(world.equal)


async def test_the_last_batch_lost_with_the_connection(world: World) -> None:
    await world.start()
    worker = await world.worker("a")
    worker.store([1])
    await eventually(world.equal)
    world.nats.stop(empty=True)
    await eventually(lambda: not world.publisher.connected and not world.bus.connected)
    worker.store([2])
    assert match(world.feed, [1]) == {"a": (1, 1, 1, 1)}, "the last known state is used meanwhile"
    world.nats.start()
    await eventually(world.equal)


async def test_a_restarted_worker_starts_empty(world: World) -> None:
    await world.start()
    worker = await world.worker("a")
    worker.store([1, 2, 3])
    await eventually(world.equal)
    worker.restart([7, 8])
    world.join(worker)
    await eventually(world.equal)
    assert match(world.feed, [1]) == {}


async def test_batches_of_a_former_life_are_void(world: World) -> None:
    await world.start()
    worker = await world.worker("a")
    worker.store([1])
    await eventually(world.equal)
    batch = KvEventBatch(holder_id="a", incarnation=99, sequence=1, ops=[4], counts=[1], hashes=[5])
    world.publisher.publish("kvmesh.kv.a", batch.SerializeToString())
    await asyncio.sleep(0.1)
    assert match(world.feed, [5]) == {}
    assert is_live(world.feed, "a")


async def test_a_worker_that_leaves_is_dropped(world: World) -> None:
    await world.start()
    worker, other = await world.worker("a"), await world.worker("b")
    worker.store([1])
    other.store([1])
    await eventually(world.equal)
    world.members.drop("a")
    assert set(match(world.feed, [1])) == {"b"}
    assert world.feed.blocks_of("a") == 0
    worker.store([2])
    await asyncio.sleep(0.05)
    assert match(world.feed, [2]) == {}
    world.join(worker)
    await eventually(world.equal)


async def test_snapshots_are_tried_until_they_come(world: World) -> None:
    await world.start()
    worker = await world.worker("a", join=False)
    assert worker.server is not None
    port = worker.server.port
    worker.store([1])
    worker.store([2])
    await asyncio.sleep(0.05)
    await worker.stop()
    world.join(worker)
    worker.store([3])
    await asyncio.sleep(0.3)
    assert not is_live(world.feed, "a")
    assert match(world.feed, [1]) == {}
    await worker.serve(port)
    await eventually(world.equal)


async def test_a_first_batch_needs_no_snapshot(world: World) -> None:
    await world.start()
    worker = await world.worker("a", join=False)
    await worker.stop()
    world.join(worker)
    worker.store([1])
    worker.store([2])
    await eventually(lambda: world.feed.blocks_of("a") == 2)
    assert is_live(world.feed, "a")


async def test_a_snapshot_of_another_life_is_refused(world: World) -> None:
    await world.start()
    worker = await world.worker("a", join=False)
    worker.store([1])
    await asyncio.sleep(0.05)
    first = worker.publication
    worker.restart()
    world.join(worker)
    worker.publication = first
    await eventually(lambda: worker.snapshots >= 2)
    assert not is_live(world.feed, "a")
    assert match(world.feed, [1]) == {}
    worker.restart()
    world.join(worker)
    await eventually(lambda: is_live(world.feed, "a"))


async def test_stores_serve_the_engines_of_their_node(world: World) -> None:
    await world.start()
    await world.worker("near", node="node-a")
    await world.worker("far", node="node-b")
    store = Holder("kvbm-7", world.publisher, tier=Tier.TIER_HOST, node="node-a")
    store.store([1, 2])
    await eventually(lambda: match(world.feed, [1, 2]) == {"near": (0, 2, 2, 2)})
    # Nobody knows where to ask this store: after a loss it is followed from what comes next.
    store.bus.lose = 1
    store.store([3])
    store.store([4])
    await eventually(lambda: match(world.feed, [4]) == {"near": (0, 1, 1, 1)})
    assert match(world.feed, [1]) == {}


async def test_the_configured_store_is_watched(world: World) -> None:
    store = Holder("kvbm-0", world.publisher, tier=Tier.TIER_HOST)
    address = await store.serve()
    assert store.server is not None
    port = store.server.port
    world.feed = world.make_feed(store_id="kvbm-0", store_address=address, store_node="node-a")
    await world.start()
    await world.worker("a")
    store.store([1, 2])
    await eventually(lambda: is_live(world.feed, "kvbm-0"))
    store.store([3], parent=2)
    await eventually(lambda: match(world.feed, [1, 2, 3]) == {"a": (0, 3, 3, 3)})
    await store.stop()
    await eventually(lambda: match(world.feed, [1]) == {})
    store.restart()
    await store.serve(port)
    await eventually(lambda: is_live(world.feed, "kvbm-0"))
    store.store([9])
    await eventually(lambda: match(world.feed, [9]) == {"a": (0, 1, 1, 1)})
    await world.feed.close()
    await store.stop()


async def test_wrong_tiers_and_garbage_do_no_harm(world: World) -> None:
    await world.start()
    worker = await world.worker("a")
    worker.publication.stored(Tier.TIER_HOST, [5], None)
    worker.publication.flush()
    world.publisher.publish("kvmesh.kv.a", b"\xff\xff")
    worker.store([1])
    await eventually(lambda: match(world.feed, [1]) == {"a": (1, 1, 1, 1)})
    assert match(world.feed, [5]) == {}
    assert is_live(world.feed, "a")


@pytest.mark.parametrize("seed", range(3))
async def test_random_faults_end_equal_to_the_truth(world: World, seed: int) -> None:
    """Losses, restarts, departures and a NATS restart under a stream of events."""
    random = Random(seed)
    await world.start()
    holders = [await world.worker(f"w{n}", node=f"node-{n % 2}") for n in range(4)]
    for step in range(600):
        holder = random.choice(holders)
        action = random.random()
        if action < 0.6:
            start = random.randrange(1, 200)
            holder.store(range(start, start + random.randrange(1, 8)), parent=start - 1 or None)
        elif action < 0.85:
            holder.remove(random.sample(sorted(holder.blocks) or [1], min(3, len(holder.blocks) or 1)))
        elif action < 0.87:
            holder.clear()
        elif action < 0.93:
            holder.bus.lose = random.randrange(1, 4)
        elif action < 0.96:
            holder.restart([500])
            world.join(holder)
        elif action < 0.98:
            world.members.drop(holder.id)
            world.join(holder)
        if step == 300:
            world.nats.stop(empty=True)
            await asyncio.sleep(0.1)
            world.nats.start()
            await eventually(lambda: world.bus.connected and world.publisher.connected)
        if random.random() < 0.1:
            await asyncio.sleep(0.005)
    for holder in holders:
        # Only a later batch shows that an earlier one was lost.
        holder.bus.lose = 0
        holder.store([1000])
    await eventually(world.equal, timeout=10)
