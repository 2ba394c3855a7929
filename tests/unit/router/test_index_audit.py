"""`kvmesh index verify` finds what differs; a digest finds it without anybody asking."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest

from fixtures.holders import Holder, Members, is_live, worker_info
from fixtures.nats import NatsServer
from fixtures.waiting import eventually
from kvmesh.cli.index_audit import Audit, Comparison, Result
from kvmesh.common.bus import Bus
from kvmesh.common.config import Config
from kvmesh.common.events.columns import read_digest
from kvmesh.common.grpc.client import Channels
from kvmesh.common.lifecycle import RoleServer
from kvmesh.core import PrefixIndex
from kvmesh.router.index import IndexFeed
from kvmesh.router.served import IndexServicer
from kvmesh.router.service import RouterService
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.events_pb2_grpc import add_EventServiceServicer_to_server
from kvmesh.v1.router_pb2_grpc import add_RouterServiceServicer_to_server


class Router:
    """A served router, with a view of its own on who is there."""

    def __init__(self, nats: NatsServer, channels: Channels, max_bytes: int | None = None) -> None:
        self.bus = Bus(nats.url, "router")
        self.members = Members()
        self.index = PrefixIndex(max_bytes)
        self.feed = IndexFeed(self.index, self.members, self.bus, channels)
        config = Config()
        config.router.port = config.router.metrics_port = 0
        self.server = RoleServer("router", config, config.router)
        service = RouterService(self.members, self.bus, self.feed, config.router, random=Random(1))
        self.server.add_service("kvmesh.v1.RouterService", add_RouterServiceServicer_to_server, service)
        self.server.add_service(
            "kvmesh.v1.EventService", add_EventServiceServicer_to_server, IndexServicer(self.feed)
        )

    @property
    def address(self) -> str:
        return self.server.address

    async def start(self) -> None:
        await self.bus.start()
        await self.feed.start()
        await self.server.start()
        await eventually(lambda: self.bus.connected)

    async def close(self) -> None:
        await self.feed.close()
        await self.server.stop(0)
        await self.bus.close()


class World:
    """A router and a worker, `w`, which it and the registry know."""

    def __init__(self, nats: NatsServer, max_bytes: int | None = None) -> None:
        self.nats = nats
        self.publisher = Bus(nats.url, "worker")
        self.channels = Channels()
        self.registered: dict[str, str] = {}
        self.router = Router(nats, self.channels, max_bytes)
        self.routers = [self.router]
        self.members, self.index, self.feed = self.router.members, self.router.index, self.router.feed
        self.worker = Holder("w", self.publisher)

    async def start(self) -> None:
        await self.publisher.start()
        await self.router.start()
        self.registered["w"] = await self.worker.serve()
        self.join(self.router)
        await eventually(lambda: self.publisher.connected and is_live(self.feed, "w"))

    def join(self, router: Router) -> None:
        router.members.put(worker_info("w", address=self.registered["w"]))

    async def add_router(self) -> Router:
        """One that knows nobody."""
        router = Router(self.nats, self.channels)
        self.routers.append(router)
        await router.start()
        return router

    def audit(self) -> Audit:
        async def registered() -> dict[str, str]:
            return self.registered

        return Audit(self.channels, registered)

    async def verify(self) -> Comparison:
        (comparison,) = await self.audit().verify([self.router.address])
        return comparison

    async def close(self) -> None:
        for router in self.routers:
            await router.close()
        await self.worker.stop()
        await self.channels.close()
        await self.publisher.close()


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
    audit = world.audit()
    try:
        for _ in range(20):
            state = await audit.state(world.router.address)
            (held,) = state.holders
            found = Comparison(world.router.address, "w", Result.EQUAL)
            compared = await audit._compare_blocks(found, held)
            assert compared.result is Result.EQUAL, (compared.missing, compared.extra)
    finally:
        done.set()
        await churning


async def test_a_silent_divergence_lives_less_than_five_seconds(world: World) -> None:
    world.worker.store(range(1, 50))
    world.worker.publication.start()
    await eventually(lambda: world.feed.blocks_of("w") == 49)
    (truth,) = world.worker.publication._digests()
    world.index.remove(0, [5, 6])
    world.index.store(0, [0xABC])

    def right() -> bool:
        return world.index.digest(0) == read_digest(truth) and is_live(world.feed, "w")

    assert not right()
    await eventually(right, 5.0)
    assert world.feed.divergences_total == 1
    assert (await world.verify()).result is Result.EQUAL


async def test_what_was_forgotten_at_the_cap_is_no_divergence(nats: NatsServer) -> None:
    world = World(nats, max_bytes=200_000)
    await world.start()
    try:
        for start in range(0, 40_000, 1000):
            world.worker.store(range(start, start + 1000))
        await eventually(lambda: world.worker.publication.sequence == world.feed.holders()[0].sequence)
        assert world.feed.divergences_total == 0
        assert is_live(world.feed, "w")
        found = await world.verify()
        assert found.result is Result.CAPPED
        assert found.fine
        assert not found.extra
        assert len(found.missing["device"]) + found.blocks == 40_000
    finally:
        await world.close()


@pytest.mark.parametrize("extra", [1, 2], ids=["as many", "more"])
async def test_blocks_too_many_are_a_divergence_also_after_the_cap(nats: NatsServer, extra: int) -> None:
    world = World(nats, max_bytes=200_000)
    await world.start()
    try:
        world.worker.store(range(40_000))
        await eventually(lambda: 0 < world.feed.blocks_of("w") < 40_000)
        world.worker.clear()
        world.worker.store([1, 2])
        await eventually(lambda: world.feed.blocks_of("w") == 2)
        world.index.remove(0, [1])
        world.index.store(0, range(100, 100 + extra))
        world.worker.store([3])
        await eventually(lambda: world.feed.divergences_total == 1)
        await eventually(lambda: is_live(world.feed, "w"))
        assert sorted(world.index.blocks(0).tolist()) == [1, 2, 3]
    finally:
        await world.close()


async def test_what_was_forgotten_of_others_excuses_nobody(nats: NatsServer) -> None:
    world = World(nats, max_bytes=200_000)
    await world.start()
    try:
        other = world.index.add_engine("other")
        world.index.store(other, range(100, 40_100))
        assert world.index.forgotten(other) > 0
        world.worker.store([1, 2])
        await eventually(lambda: world.feed.blocks_of("w") == 2)
        world.index.remove(0, [1])
        found = await world.verify()
        assert (found.result, found.missing) == (Result.DIFFERENT, {"device": [f"{1:016x}"]})
        world.worker.store([3])
        await eventually(lambda: world.feed.divergences_total == 1)
        await eventually(lambda: sorted(world.index.blocks(0).tolist()) == [1, 2, 3])
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


@pytest.mark.parametrize("known_from", ["registry", "other router"])
async def test_a_worker_that_a_router_has_never_heard_of_is_a_difference(
    world: World, monkeypatch: pytest.MonkeyPatch, known_from: str
) -> None:
    monkeypatch.setattr("kvmesh.cli.index_audit.PATIENCE_S", 0.2)
    world.worker.store([1, 2])
    await eventually(lambda: world.feed.blocks_of("w") == 2)
    second = await world.add_router()
    asked = [second.address] if known_from == "registry" else [world.router.address, second.address]
    if known_from == "other router":
        world.registered = {}
    *others, absent = await world.audit().verify(asked)
    assert [found.result for found in others] == [Result.EQUAL] * (len(asked) - 1)
    assert (absent.router, absent.holder, absent.result) == (second.address, "w", Result.ABSENT)
    assert absent.missing == {"device": [f"{1:016x}", f"{2:016x}"]}
    assert not absent.fine


async def test_every_router_is_compared(world: World) -> None:
    world.worker.store([1, 2])
    second = await world.add_router()
    world.join(second)
    await eventually(lambda: all(router.feed.blocks_of("w") == 2 for router in world.routers))
    second.index.store(0, [3])
    found = await world.audit().verify([world.router.address, second.address])
    by_router = {one.router: (one.result, one.extra) for one in found}
    assert by_router == {
        world.router.address: (Result.EQUAL, {}),
        second.address: (Result.DIFFERENT, {"device": [f"{3:016x}"]}),
    }


async def test_a_router_that_hears_nothing_any_more_is_not_right(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing shows it that it lacks something; what it has is what the worker had."""
    monkeypatch.setattr("kvmesh.cli.index_audit.PATIENCE_S", 0.2)
    world.worker.store([1])
    await eventually(lambda: world.feed.blocks_of("w") == 1)
    world.worker.bus.lose = 1
    world.worker.store([2])
    found = await world.verify()
    assert found.result is Result.BEHIND
    # The next batch does.
    world.worker.store([3])
    assert (await world.verify()).result is Result.EQUAL


async def test_a_worker_that_joins_meanwhile_is_no_difference(world: World) -> None:
    second = await world.add_router()
    asyncio.get_running_loop().call_later(0.3, world.join, second)
    (found,) = await world.audit().verify([second.address])
    assert found.result is Result.EQUAL


async def test_blocks_that_nobody_can_vouch_for_are_not_fine(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmesh.cli.index_audit.PATIENCE_S", 0.2)
    # It does not say where it is.
    store = Holder("kvbm-7", world.publisher, tier=Tier.TIER_HOST)
    store.store([1])
    await eventually(lambda: world.feed.blocks_of("kvbm-7") == 1)
    found = {one.holder: one for one in await world.audit().verify([world.router.address])}
    assert found["w"].result is Result.EQUAL
    assert found["kvbm-7"].result is Result.UNKNOWN
    assert not found["kvbm-7"].fine
    world.registered["kvbm-7"] = await store.serve()
    found = {one.holder: one for one in await world.audit().verify([world.router.address])}
    assert found["kvbm-7"].result is Result.EQUAL, "others know where it is"
    await store.stop()


async def test_the_command_exits_with_1_and_the_differences(world: World, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVMESH_")} | {
        "KVMESH_HOME": str(tmp_path),
        "KVMESH_NATS__URL": world.nats.url,
        "KVMESH_KVBM__ENABLED": "false",
    }

    world.worker.store([1, 2])
    await eventually(lambda: world.feed.blocks_of("w") == 2)
    world.index.remove(0, [2])
    world.index.store(0, [0xABC])
    verify = ("-m", "kvmesh.cli", "index", "verify", "--json", "--router", world.router.address)
    run = await asyncio.create_subprocess_exec(
        sys.executable, *verify, env=environment, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await run.communicate()
    document = json.loads(output)
    (found,) = document["comparisons"]
    assert (run.returncode, document["equal"]) == (1, False)
    assert (found["holder"], found["result"]) == ("w", "different")
    assert (found["missing"], found["extra"]) == ({"device": [f"{2:016x}"]}, {"device": [f"{0xABC:016x}"]})


async def test_a_router_that_starts_reads_a_million_blocks(world: World) -> None:
    random = Random(9)
    for _ in range(100):
        world.worker.store(random.getrandbits(64) for _ in range(10_000))
    # The ring of batches does not reach back to the first.
    second = await world.add_router()
    world.join(second)
    await eventually(lambda: is_live(second.feed, "w"), 20)
    assert second.feed.blocks_of("w") == 1_000_000
    (wanted,) = world.worker.publication._digests()
    assert second.index.digest(0) == read_digest(wanted)
