"""`kvmesh index verify` finds what differs; a digest finds it without anybody asking."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random

import pytest

from fixtures.holders import Holder, Members, worker_info
from fixtures.nats import NatsServer
from fixtures.waiting import eventually
from kvmesh.cli.index_audit import Audit, Comparison, Result
from kvmesh.common.bus import Bus
from kvmesh.common.config import Config
from kvmesh.common.events import publication as publication_module
from kvmesh.common.events.columns import read_digest
from kvmesh.common.grpc.client import Channels
from kvmesh.common.lifecycle import RoleServer
from kvmesh.core import PrefixIndex
from kvmesh.router.index import IndexFeed
from kvmesh.router.served import IndexServicer
from kvmesh.router.service import RouterService
from kvmesh.v1.events_pb2_grpc import add_EventServiceServicer_to_server
from kvmesh.v1.router_pb2_grpc import add_RouterServiceServicer_to_server


class World:
    """A served router and a worker."""

    def __init__(self, nats: NatsServer, max_bytes: int | None = None) -> None:
        self.bus, self.publisher = Bus(nats.url, "router"), Bus(nats.url, "worker")
        self.channels = Channels()
        self.members = Members()
        self.index = PrefixIndex(max_bytes)
        self.feed = IndexFeed(self.index, self.members, self.bus, self.channels)
        self.worker = Holder("w", self.publisher)
        config = Config()
        config.router.port = config.router.metrics_port = 0
        self.server = RoleServer("router", config, config.router)
        service = RouterService(self.members, self.bus, self.feed, config.router, random=Random(1))
        self.server.add_service("kvmesh.v1.RouterService", add_RouterServiceServicer_to_server, service)
        self.server.add_service(
            "kvmesh.v1.EventService", add_EventServiceServicer_to_server, IndexServicer(self.feed)
        )

    async def start(self) -> None:
        await self.bus.start()
        await self.publisher.start()
        await self.feed.start()
        await self.server.start()
        address = await self.worker.serve()
        self.members.put(worker_info("w", address=address))
        await eventually(lambda: self.bus.connected and self.publisher.connected and self.feed.is_live("w"))

    async def verify(self) -> Comparison:
        (comparison,) = await Audit(self.channels).verify(self.server.address)
        return comparison

    async def close(self) -> None:
        await self.feed.close()
        await self.worker.stop()
        await self.server.stop(0)
        await self.channels.close()
        await self.publisher.close()
        await self.bus.close()


@pytest.fixture
async def world(nats: NatsServer) -> AsyncIterator[World]:
    world = World(nats)
    await world.start()
    yield world
    await world.close()


async def test_an_index_that_is_right(world: World) -> None:
    world.worker.store(range(1, 50))
    world.worker.remove([7])
    await eventually(lambda: world.feed.blocks_of("w") == 48)
    found = await world.verify()
    assert (found.result, found.blocks, found.missing, found.extra) == (Result.EQUAL, 48, {}, {})


async def test_differences_are_named_block_by_block(world: World) -> None:
    world.worker.store(range(1, 50))
    await eventually(lambda: world.feed.blocks_of("w") == 49)
    world.index.remove(0, [5])
    world.index.store(0, [0xABC])
    found = await world.verify()
    assert found.result is Result.DIFFERENT
    assert found.missing == {"device": [f"{5:016x}"]}
    assert found.extra == {"device": [f"{0xABC:016x}"]}
    assert not found.fine


async def test_sets_are_compared_at_one_batch_while_events_go_on(world: World) -> None:
    """Without digests to compare first: the digest is wrong on purpose, the sets are not."""
    random = Random(4)
    done = asyncio.Event()

    async def churn() -> None:
        while not done.is_set():
            world.worker.store([random.randrange(1000) for _ in range(5)])
            world.worker.remove(random.sample(sorted(world.worker.blocks), 3))
            await asyncio.sleep(0.001)

    churning = asyncio.create_task(churn())
    audit = Audit(world.channels)
    try:
        for _ in range(20):
            state = await audit.state(world.server.address)
            (held,) = state.holders
            found = Comparison(world.server.address, "w", Result.EQUAL)
            compared = await audit._compare_blocks(found, held, capped=False)
            assert compared.result is Result.EQUAL, (compared.missing, compared.extra)
    finally:
        done.set()
        await churning


async def test_a_silent_divergence_ends_by_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publication_module, "IDLE_S", 0.05)
    world.worker.store(range(1, 50))
    await eventually(lambda: world.feed.blocks_of("w") == 49)
    world.index.remove(0, [5, 6])
    world.worker.publication.start()
    await eventually(lambda: world.feed.divergences_total == 1)
    await eventually(lambda: world.feed.blocks_of("w") == 49 and world.feed.is_live("w"))
    assert (await world.verify()).result is Result.EQUAL


async def test_what_was_forgotten_at_the_cap_is_no_divergence(nats: NatsServer) -> None:
    world = World(nats, max_bytes=200_000)
    await world.start()
    try:
        for start in range(0, 40_000, 1000):
            world.worker.store(range(start, start + 1000))
        await eventually(lambda: world.worker.publication.sequence == world.feed.holders()[0].sequence)
        assert world.feed.divergences_total == 0
        assert world.feed.is_live("w")
        found = await world.verify()
        assert found.result is Result.CAPPED
        assert found.fine
        assert not found.extra
        assert len(found.missing["device"]) + found.blocks == 40_000
    finally:
        await world.close()


async def test_a_worker_that_does_not_answer_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmesh.cli.index_audit.PATIENCE_S", 0.2)
    world.worker.store([1])
    await eventually(lambda: world.feed.blocks_of("w") == 1)
    assert world.worker.server is not None
    await world.worker.server.stop(0)
    found = await world.verify()
    assert found.result is Result.UNREACHABLE
    assert found.error


async def test_a_router_that_starts_reads_a_million_blocks(world: World) -> None:
    random = Random(9)
    for _ in range(100):
        world.worker.store(random.getrandbits(64) for _ in range(10_000))
    # The ring of batches does not reach back to the first.
    bus = Bus(world.bus._url, "second")
    second = IndexFeed(PrefixIndex(), world.members, bus, world.channels)
    await bus.start()
    await second.start()
    try:
        await eventually(lambda: second.is_live("w"), 20)
        assert second.blocks_of("w") == 1_000_000
        (wanted,) = world.worker.publication._digests()
        assert second.index.digest(0) == read_digest(wanted)
    finally:
        await second.close()
        await bus.close()
