"""What an engine asks for and only other nodes, or object storage, have comes while its request waits."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import numpy as np
import pytest

from fixtures.kvbm import MIB, SEGMENTS, Kvbm, Pool, chain
from fixtures.nats import NatsServer
from fixtures.s3 import S3Server
from fixtures.waiting import eventually
from kvmesh.core import StoreClient
from kvmesh.v1.kvbm_pb2 import GetStatsRequest, GetStatsResponse, PersistRequest
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceStub

COUNT = 64
BLOCKS = chain(COUNT)
# In how long the engine computes a block: it waits for all of them, or not for one.
SLOW_S, FAST_S = 1.0, 1e-6


class Node:
    """A store and an engine's connection to it."""

    def __init__(self, store: Kvbm, stub: Any) -> None:
        self.store, self.stub = store, stub
        self.engine = store.client()

    async def stats(self) -> GetStatsResponse:
        return await self.stub.GetStats(GetStatsRequest(), timeout=10)

    async def failed(self) -> dict[str, int]:
        return dict((await self.stats()).network.failed)

    async def settled(self, blocks: bytes = BLOCKS, per_block_s: float = SLOW_S, within_s: float = 20) -> int:
        """Blocks there are once the store has brought what it can, as an engine asks again and again."""
        until = time.monotonic() + within_s
        while True:
            found, coming = await asyncio.to_thread(self.engine.lookup_for, blocks, per_block_s)
            if not coming:
                return found
            assert time.monotonic() < until, "the engine waits for ever"
            await asyncio.sleep(0.002)

    async def idle(self) -> None:
        """No slot is in use, and nothing is lent."""
        stats = None
        for _ in range(1000):
            stats = await self.stats()
            if stats.tiers[0].blocks_in_use == 0 and stats.network.lent == 0:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"not idle: {stats}")


class Nodes:
    """Starts nodes by name."""

    def __init__(self, home: Path, nats_url: str, cleanup: AsyncExitStack) -> None:
        self._home, self._nats_url, self._cleanup = home, nats_url, cleanup

    async def start(self, name: str, environment: dict[str, str] | None = None, **options: Any) -> Node:
        (home := self._home / name).mkdir()
        store = Kvbm(home, self._nats_url, host_bytes=8 * MIB, **options)
        identity = {"KVMESH_NODE": f"node-{name}", "KVMESH_KVBM__ID": f"kvbm-{name}"}
        store.environment |= identity | (environment or {})
        self._cleanup.callback(_end, store)
        await store.start()
        channel = await self._cleanup.enter_async_context(grpc.aio.insecure_channel(store.address))
        return Node(store, KvbmServiceStub(channel))


@pytest.fixture
async def nodes(tmp_path: Path, nats: NatsServer) -> AsyncIterator[Nodes]:
    async with AsyncExitStack() as cleanup:
        yield Nodes(tmp_path, nats.url, cleanup)


def _end(store: Kvbm) -> None:
    if store.process is not None and store.process.poll() is None:
        store.process.send_signal(signal.SIGCONT)
        assert store.end() == 0


def offloaded(node: Node, blocks: bytes = BLOCKS) -> Pool:
    pool, count = Pool(COUNT, 1), len(blocks) // 32
    assert node.engine.offload(None, blocks, pool.pages, list(range(count))) == (count, 0, 0)
    return pool


def loaded(engine: StoreClient, blocks: bytes = BLOCKS) -> tuple[Pool, tuple[int, int]]:
    """The blocks, and how many of them came up from the disk and from the network for this."""
    lease = engine.lease(blocks)
    assert lease is not None
    origins, count = lease.origins, len(blocks) // 32
    back = Pool(COUNT, 9)
    lease.load(back.pages, list(range(count)), 0, len(SEGMENTS))
    lease.release()
    return back, origins


def same(pool: Pool, back: Pool, blocks: int = COUNT) -> bool:
    pairs = zip(pool.buffers, back.buffers, strict=True)
    return all(np.array_equal(a[:blocks], b[:blocks]) for a, b in pairs)


async def known(node: Node, blocks: bytes = BLOCKS) -> None:
    """Until a look-up wants something from elsewhere: of an engine too fast for anything to come."""

    def wanted() -> bool:
        node.engine.lookup_for(blocks, FAST_S)
        text = httpx.get(f"http://127.0.0.1:{node.store.metrics_port}/metrics").text
        return "kvmesh_kvbm_network_wanted_total 0.0" not in text

    await eventually(wanted, 20)


async def test_a_look_up_brings_what_another_node_has(nodes: Nodes) -> None:
    first, second = await nodes.start("a"), await nodes.start("b")
    pool = offloaded(first)
    # Not asked for by an engine that says nothing of its speed.
    assert second.engine.lookup(BLOCKS) == 0
    for _ in range(1000):
        if await second.settled() == COUNT:
            break
        # The second does not know yet what the first has.
        await asyncio.sleep(0.02)
    back, origins = await asyncio.to_thread(loaded, second.engine)
    assert same(pool, back)
    assert origins == (0, COUNT)
    # From now on they are this node's.
    assert (await asyncio.to_thread(loaded, second.engine))[1] == (0, 0)
    stats = await second.stats()
    assert stats.network.fetched_total == COUNT
    assert not stats.network.failed
    await first.idle()
    await second.idle()


async def test_only_what_is_lacking_is_brought(nodes: Nodes) -> None:
    first, second = await nodes.start("a"), await nodes.start("b")
    pool = offloaded(first)
    offloaded(second, BLOCKS[: 32 * 20])
    longer = BLOCKS + chain(8, 1000)
    for _ in range(1000):
        if await second.settled(longer) == COUNT:
            break
        await asyncio.sleep(0.02)
    back, origins = await asyncio.to_thread(loaded, second.engine)
    assert same(pool, back)
    assert origins == (0, COUNT - 20)
    assert (await second.stats()).network.fetched_total == COUNT - 20


async def test_an_engine_that_computes_faster_does_not_wait(nodes: Nodes) -> None:
    first, second = await nodes.start("a"), await nodes.start("b")
    offloaded(first)
    await known(second)
    assert await second.settled(per_block_s=FAST_S, within_s=2) == 0
    assert (await second.failed()).keys() <= {"late", "slow"}
    await second.idle()


async def test_a_node_that_hangs_costs_the_time_of_computing(nodes: Nodes) -> None:
    first, second = await nodes.start("a"), await nodes.start("b")
    offloaded(first)
    offloaded(first, chain(COUNT, 5000))
    await known(second)
    assert first.store.process is not None
    first.store.process.send_signal(signal.SIGSTOP)
    # Another chain, since what did not come once is not wanted again at once.
    other, began = chain(COUNT, 5000), time.monotonic()
    assert await second.settled(other, per_block_s=0.5 / COUNT) == 0
    assert 0.4 < time.monotonic() - began < 5
    assert second.engine.lease(other) is None
    # It is not asked for again and again.
    assert await second.settled(other) == 0
    first.store.process.send_signal(signal.SIGCONT)
    await second.idle()
    await first.idle()


async def test_a_node_that_is_gone_is_forgotten(nodes: Nodes) -> None:
    first, second = await nodes.start("a"), await nodes.start("b")
    other = chain(COUNT, 5000)
    offloaded(first)
    offloaded(first, other)
    await known(second)
    first.store.end(signal.SIGKILL)
    # Stores announce themselves every second; this one has not for longer than it is believed to be there.
    await asyncio.sleep(8)
    assert second.engine.lookup_for(other, SLOW_S) == (0, False)


@pytest.mark.parametrize("storage", ["directory", "s3"])
async def test_a_look_up_brings_what_is_in_object_storage(
    storage: str, nodes: Nodes, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    environment = {"KVMESH_KVBM__OBJECT__URL": f"fs://{tmp_path}/objects"}
    if storage == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        await s3.start()
        environment = s3.environment()
    first = await nodes.start("a", environment)
    pool = offloaded(first)
    await first.stub.Persist(PersistRequest(), timeout=30)
    assert first.store.end() == 0
    second = await nodes.start("b", environment)
    assert await second.settled() == COUNT
    back, origins = await asyncio.to_thread(loaded, second.engine)
    assert same(pool, back)
    assert origins == (0, COUNT)
    assert (await second.stats()).objects.recalled_total == COUNT
    await second.idle()


async def test_what_came_from_the_disk_is_told_once(nodes: Nodes, tmp_path: Path) -> None:
    node = await nodes.start("a", nvme=tmp_path / "disk")
    pool = offloaded(node)
    await node.stub.Persist(PersistRequest(), timeout=30)
    assert node.store.end() == 0
    await node.store.start()
    engine = node.store.client()
    assert engine.lookup(BLOCKS) == COUNT
    back, origins = await asyncio.to_thread(loaded, engine)
    assert same(pool, back)
    assert origins == (COUNT, 0)
    assert (await asyncio.to_thread(loaded, engine))[1] == (0, 0)
