"""Every discovery does the same: NATS leases against a real server, the static list against real workers."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import yaml

from fixtures.nats import NatsServer
from fixtures.waiting import eventually
from kvmesh.cli.holders import registered_holders
from kvmesh.common.bus import Bus
from kvmesh.common.config import Config
from kvmesh.common.discovery import Discovery, make_discovery
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.client import Channels
from kvmesh.common.lifecycle import RoleServer
from kvmesh.v1.common_pb2 import WorkerInfo, WorkerState
from kvmesh.v1.engine_pb2 import GetWorkerRequest, GetWorkerResponse
from kvmesh.v1.engine_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server

HEARTBEAT_S = 0.1
TTL_S = 0.6


class Member(WorkerServiceServicer):
    """A worker as far as discovery sees it: a registration that can change, served by a real server."""

    def __init__(self, worker_id: str, incarnation: int = 1) -> None:
        self.info = WorkerInfo(
            id=worker_id, incarnation=incarnation, state=WorkerState.WORKER_STATE_READY, node="n"
        )
        self.server: RoleServer | None = None
        self.bus: Bus | None = None
        self.discovery: Discovery | None = None

    async def GetWorker(
        self, request: GetWorkerRequest, context: grpc.aio.ServicerContext
    ) -> GetWorkerResponse:
        return GetWorkerResponse(worker=self.info)

    async def serve(self, port: int = 0) -> None:
        config = Config()
        config.worker.port, config.worker.metrics_port = port, 0
        self.server = RoleServer("decode", config, config.worker)
        self.server.add_service("kvmesh.v1.WorkerService", add_WorkerServiceServicer_to_server, self)
        await self.server.start()
        self.info.address = self.server.address


class Harness(ABC):
    """What the suite needs of one kind of discovery."""

    def __init__(self) -> None:
        self.heartbeat_s, self.ttl_s = HEARTBEAT_S, TTL_S
        self.members: list[Member] = []
        self.readers: list[tuple[Bus, Discovery]] = []

    @abstractmethod
    def config(self) -> Config: ...

    async def reader(self) -> Discovery:
        """A started process that only watches."""
        config = self.config()
        bus = Bus(config.nats.effective_url(), "reader")
        discovery = make_discovery(config, bus)
        await bus.start()
        await discovery.start()
        self.readers.append((bus, discovery))
        return discovery

    async def join(self, worker_id: str, incarnation: int = 1, port: int = 0) -> Member:
        """A worker that serves and registers."""
        member = Member(worker_id, incarnation)
        await member.serve(port)
        config = self.config()
        member.bus = Bus(config.nats.effective_url(), worker_id)
        member.discovery = make_discovery(config, member.bus)
        await member.bus.start()
        await member.discovery.register(lambda: member.info)
        self.members.append(member)
        self.joined(member)
        return member

    def joined(self, member: Member) -> None:
        """Make the worker known where registering does not."""
        return

    async def leave(self, member: Member) -> None:
        """An orderly stop."""
        assert member.discovery is not None
        assert member.server is not None
        await member.discovery.deregister()
        await member.server.stop(0)

    async def die(self, member: Member) -> None:
        """A crash: nothing is said."""
        assert member.bus is not None
        assert member.server is not None
        await member.bus.close()
        await member.server.stop(0)

    async def close(self) -> None:
        for bus, discovery in self.readers:
            await discovery.close()
            await bus.close()
        for member in self.members:
            assert member.bus is not None
            assert member.discovery is not None
            assert member.server is not None
            await member.discovery.close()
            await member.bus.close()
            await member.server.stop(0)


class NatsHarness(Harness):
    def __init__(self, server: NatsServer) -> None:
        super().__init__()
        self.server = server

    def config(self) -> Config:
        config = Config()
        config.nats.url = self.server.url
        config.discovery.heartbeat_s, config.discovery.ttl_s = self.heartbeat_s, self.ttl_s
        return config


class StaticHarness(Harness):
    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.addresses: list[str] = []
        self.write()

    def config(self) -> Config:
        config = Config()
        # Static discovery never touches the bus.
        config.nats.url = "nats://127.0.0.1:1"
        config.discovery.kind = "static"
        config.discovery.file = str(self.file)
        config.discovery.heartbeat_s, config.discovery.ttl_s = self.heartbeat_s, self.ttl_s
        return config

    def write(self) -> None:
        self.file.write_text(yaml.safe_dump({"workers": self.addresses}))

    def joined(self, member: Member) -> None:
        if member.info.address not in self.addresses:
            self.addresses.append(member.info.address)
            self.write()

    async def leave(self, member: Member) -> None:
        self.addresses.remove(member.info.address)
        self.write()
        await super().leave(member)


@pytest.fixture
async def leases(nats: NatsServer) -> AsyncIterator[NatsHarness]:
    """NATS discovery alone, for what only it can suffer."""
    harness = NatsHarness(nats)
    yield harness
    await harness.close()


@pytest.fixture(params=["nats", "static"])
async def harness(
    request: pytest.FixtureRequest, nats_down: NatsServer, tmp_path: Path
) -> AsyncIterator[Harness]:
    if request.param == "nats":
        nats_down.start()
        made: Harness = NatsHarness(nats_down)
    else:
        made = StaticHarness(tmp_path / "workers.yaml")
    yield made
    await made.close()


async def test_readers_see_workers_come_and_go(harness: Harness) -> None:
    # Who leaves in order is gone at once, not when the lease ends.
    harness.ttl_s = 60
    reader = await harness.reader()
    assert dict(reader.workers()) == {}
    first = await harness.join("prefill-0")
    second = await harness.join("decode-0")
    await eventually(lambda: set(reader.workers()) == {"prefill-0", "decode-0"})
    assert reader.workers()["prefill-0"] == first.info
    await harness.leave(second)
    await eventually(lambda: set(reader.workers()) == {"prefill-0"}, 10)
    await harness.leave(first)
    await eventually(lambda: not reader.workers(), 10)


async def test_a_late_reader_sees_who_is_there(harness: Harness) -> None:
    early = await harness.reader()
    await harness.join("decode-0")
    await eventually(lambda: "decode-0" in early.workers())
    late = await harness.reader()
    await eventually(lambda: "decode-0" in late.workers())


async def test_commands_see_who_is_there(harness: Harness) -> None:
    harness.ttl_s = 60
    reader, config, channels = await harness.reader(), harness.config(), Channels()
    # What is configured by default may run here, and is no business of this test.
    config.kvbm.enabled = False
    try:
        assert await registered_holders(config, channels) == {}
        first, second = await harness.join("prefill-0"), await harness.join("decode-0")
        await eventually(lambda: set(reader.workers()) == {"prefill-0", "decode-0"})
        seen = await registered_holders(config, channels)
        assert seen == {"prefill-0": first.info.address, "decode-0": second.info.address}
        await harness.leave(second)
        assert await registered_holders(config, channels) == {"prefill-0": first.info.address}
    finally:
        await channels.close()


async def test_a_registry_that_is_away_is_no_empty_one(leases: NatsHarness) -> None:
    leases.server.stop()
    channels = Channels()
    with pytest.raises(KvmeshError, match=r"the bus at .* does not answer"):
        await registered_holders(leases.config(), channels)
    await channels.close()


async def test_a_lease_is_renewed(harness: Harness) -> None:
    reader = await harness.reader()
    await harness.join("decode-0")
    await eventually(lambda: "decode-0" in reader.workers())
    for _ in range(20):
        await asyncio.sleep(TTL_S / 10)
        assert "decode-0" in reader.workers()


async def test_a_dead_worker_is_gone_after_its_ttl(harness: Harness) -> None:
    reader = await harness.reader()
    survivor = await harness.join("decode-0")
    victim = await harness.join("decode-1")
    await eventually(lambda: len(reader.workers()) == 2)
    await harness.die(victim)
    died = asyncio.get_running_loop().time()
    await eventually(lambda: set(reader.workers()) == {survivor.info.id}, timeout=4 * TTL_S)
    assert asyncio.get_running_loop().time() - died > TTL_S / 3


async def test_changes_of_state_and_load_arrive(harness: Harness) -> None:
    reader = await harness.reader()
    member = await harness.join("decode-0")
    await eventually(lambda: "decode-0" in reader.workers())
    changes: list[int] = []
    reader.subscribe(lambda: changes.append(reader.generation))
    generation = reader.generation
    member.info.load.requests = 3
    await eventually(lambda: reader.workers()["decode-0"].load.requests == 3)
    assert changes == [generation], "load alone is a change, but not one of membership"
    await asyncio.sleep(3 * HEARTBEAT_S)
    assert changes == [generation], "a heartbeat without news is no change"
    member.info.state = WorkerState.WORKER_STATE_DRAINING
    await eventually(lambda: reader.workers()["decode-0"].state == WorkerState.WORKER_STATE_DRAINING)
    assert reader.generation > generation


async def test_a_restart_is_another_incarnation(harness: Harness) -> None:
    reader = await harness.reader()
    member = await harness.join("decode-0", incarnation=1)
    await eventually(lambda: "decode-0" in reader.workers())
    generation = reader.generation
    assert member.server is not None
    port = member.server.port
    await harness.die(member)
    await harness.join("decode-0", incarnation=2, port=port)
    await eventually(lambda: "decode-0" in reader.workers() and reader.workers()["decode-0"].incarnation == 2)
    assert reader.generation > generation


async def test_a_callback_that_raises_harms_nobody(harness: Harness) -> None:
    reader = await harness.reader()
    calls: list[int] = []

    def broken() -> None:
        raise ValueError("no")

    reader.subscribe(broken)
    reader.subscribe(lambda: calls.append(1))
    await harness.join("decode-0")
    await eventually(lambda: "decode-0" in reader.workers())
    assert calls


async def test_close_and_deregister_are_idempotent(harness: Harness) -> None:
    reader = await harness.reader()
    member = await harness.join("decode-0")
    assert member.discovery is not None
    await member.discovery.deregister()
    await member.discovery.deregister()
    await member.discovery.close()
    await member.discovery.close()
    await reader.close()
    await reader.close()


async def test_nats_may_come_last(leases: NatsHarness) -> None:
    harness, nats = leases, leases.server
    nats.stop()
    reader = await harness.reader()
    await harness.join("decode-0")
    await asyncio.sleep(0.3)
    assert not reader.workers()
    nats.start()
    await eventually(lambda: "decode-0" in reader.workers())


@pytest.mark.parametrize("empty", [False, True], ids=["kept", "emptied"])
async def test_nobody_expires_while_nats_is_down(leases: NatsHarness, empty: bool) -> None:
    harness, nats = leases, leases.server
    reader = await harness.reader()
    member, victim = await harness.join("decode-0"), await harness.join("decode-1")
    await eventually(lambda: len(reader.workers()) == 2)
    nats.stop(empty=empty)
    await harness.die(victim)
    gone: list[set[str]] = []
    reader.subscribe(lambda: gone.append(set(reader.workers())))
    await asyncio.sleep(3 * TTL_S)
    assert len(reader.workers()) == 2
    nats.start()
    # The living renew; the dead are given one more lease, and no more.
    await eventually(lambda: set(reader.workers()) == {member.info.id}, timeout=10)
    assert all(member.info.id in seen for seen in gone)
    late = await harness.reader()
    await eventually(lambda: set(late.workers()) == {member.info.id})


async def test_nobody_expires_while_nats_hangs(leases: NatsHarness) -> None:
    harness, nats = leases, leases.server
    reader = await harness.reader()
    await harness.join("decode-0")
    await eventually(lambda: "decode-0" in reader.workers())
    seen: list[bool] = []
    reader.subscribe(lambda: seen.append("decode-0" in reader.workers()))
    nats.hang()
    await asyncio.sleep(3 * TTL_S)
    nats.resume()
    await asyncio.sleep(3 * TTL_S)
    assert "decode-0" in reader.workers()
    assert all(seen)


async def test_a_bucket_that_was_deleted_is_made_again(leases: NatsHarness) -> None:
    harness = leases
    reader = await harness.reader()
    member = await harness.join("decode-0")
    await eventually(lambda: "decode-0" in reader.workers())
    assert member.bus is not None
    assert member.bus.client is not None
    await member.bus.client.jetstream().delete_key_value("kvmesh-workers")
    late = await harness.reader()
    await eventually(lambda: "decode-0" in late.workers())
    assert "decode-0" in reader.workers()


async def test_register_again_renews_at_once(leases: NatsHarness) -> None:
    leases.heartbeat_s, leases.ttl_s = 60, 180
    reader = await leases.reader()
    bus = Bus(leases.server.url, "worker")
    await bus.start()
    discovery = make_discovery(leases.config(), bus)
    info = WorkerInfo(id="decode-0", incarnation=1)
    await discovery.register(lambda: info)
    await eventually(lambda: "decode-0" in reader.workers())
    info.state = WorkerState.WORKER_STATE_DRAINING
    await discovery.register(lambda: info)
    await eventually(lambda: reader.workers()["decode-0"].state == WorkerState.WORKER_STATE_DRAINING, 10)
    await discovery.close()
    await bus.close()


async def test_garbage_in_the_bucket_is_ignored(leases: NatsHarness) -> None:
    harness = leases
    reader = await harness.reader()
    await harness.join("decode-0")
    await eventually(lambda: "decode-0" in reader.workers())
    bus = harness.readers[0][0]
    bus.publish("$KV.kvmesh-workers.bad", b"\xff\xff\xff")
    bus.publish("$KV.kvmesh-workers.other", WorkerInfo(id="not-other").SerializeToString())
    await asyncio.sleep(0.2)
    assert set(reader.workers()) == {"decode-0"}


async def test_static_needs_a_usable_file(tmp_path: Path) -> None:
    config = Config()
    config.discovery.kind = "static"
    bus = Bus("nats://127.0.0.1:1", "x")
    with pytest.raises(KvmeshError, match="must name the worker list"):
        await make_discovery(config, bus).start()
    file = tmp_path / "workers.yaml"
    config.discovery.file = str(file)
    for text, wanted in [
        (None, "cannot read"),
        ("a: [", "not valid YAML"),
        ("[]", "must hold `workers:`"),
        ("workers: [nowhere]", "`nowhere` is not host:port"),
        ("workers: [{address: x}]", "is not host:port"),
    ]:
        if text is not None:
            file.write_text(text)
        with pytest.raises(KvmeshError, match=wanted):
            await make_discovery(config, bus).start()


async def test_static_keeps_the_last_good_list(tmp_path: Path) -> None:
    harness = StaticHarness(tmp_path / "workers.yaml")
    reader = await harness.reader()
    await harness.join("decode-0")
    await eventually(lambda: "decode-0" in reader.workers())
    harness.file.write_text("workers: [")
    await asyncio.sleep(2 * TTL_S)
    assert "decode-0" in reader.workers()
    await harness.close()
