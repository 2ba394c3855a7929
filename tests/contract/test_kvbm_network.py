"""Two stores with arenas of their own: what one has, the other reads by NIXL, checked, or does without."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import numpy as np
import pytest

from fixtures.holders import worker_info
from fixtures.kvbm import MIB, NAMESPACE, SEGMENTS, Kvbm, Pool, chain, numbers
from fixtures.namespaces import network
from fixtures.nats import NatsServer
from fixtures.routing import router_beside
from fixtures.waiting import eventually
from kvmesh.common.errors import KvmeshError
from kvmesh.core import FIRST_WORD, StoreClient, StoreServer
from kvmesh.kvbm.link import Link, TransferError
from kvmesh.v1.common_pb2 import Tier, WorkerState
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.kvbm_pb2 import (
    BlockNamespace,
    FetchRequest,
    FlushRequest,
    GetStatsRequest,
    GetStatsResponse,
    PrefetchRequest,
    ReturnRequest,
)
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceStub
from kvmesh.v1.router_pb2 import ReturnHint, RouteRequest

COUNT = 64
BLOCKS = chain(COUNT)
HOST = Tier.TIER_HOST


class Pair:
    """Two stores on two nodes, an engine on each; the first has `BLOCKS`."""

    def __init__(self, first: Kvbm, second: Kvbm, to_first: Any, to_second: Any) -> None:
        self.first, self.second = first, second
        self.to_first, self.to_second = to_first, to_second
        self.pool = Pool(COUNT, 1)
        self.writer, self.reader = first.client(), second.client()
        stored = self.writer.offload(None, BLOCKS, self.pool.pages, list(range(COUNT)))
        assert stored == (COUNT, 0, 0)

    async def prefetch(self, source: str = "", within_ms: int = 60_000, **fields: Any) -> None:
        named = fields or {"hashes": numbers(BLOCKS)}
        request = PrefetchRequest(
            model="m", within_ms=within_ms, source=source or self.first.address, **named
        )
        answer = await self.to_second.Prefetch(request, timeout=10)
        assert answer.coming == 0

    async def stats(self, stub: Any = None) -> GetStatsResponse:
        return await (stub or self.to_second).GetStats(GetStatsRequest(), timeout=10)

    async def when(self, condition: Callable[[GetStatsResponse], bool], stub: Any = None) -> GetStatsResponse:
        """A store's numbers, once they are so."""
        stats = await self.stats(stub)
        for _ in range(3000):
            if condition(stats):
                return stats
            await asyncio.sleep(0.01)
            stats = await self.stats(stub)
        raise AssertionError(f"not in time: {stats}")

    async def settled(self, fetched: int, **failed: int) -> None:
        """The second store has fetched so much, and not got the rest."""
        await self.when(lambda s: (s.network.fetched_total, dict(s.network.failed)) == (fetched, failed))

    async def idle(self, stub: Any) -> None:
        """No slot of a store is in use, and nothing is lent."""
        await self.when(lambda s: s.tiers[0].blocks_in_use == 0 and s.network.lent == 0, stub)


def loaded(client: StoreClient, blocks: int) -> Pool:
    lease = client.lease(BLOCKS[: 32 * blocks])
    assert lease is not None
    assert len(lease) == blocks
    back = Pool(COUNT, 9)
    lease.load(back.pages, list(range(blocks)), 0, len(SEGMENTS))
    lease.release()
    return back


def flip(store: Kvbm, pool: Pool, block: int) -> None:
    """Flip a bit of a block at rest in a store's arena, as failing memory would."""
    assert store.process is not None
    wanted = pool.buffers[2][block].tobytes()
    for link in Path(f"/proc/{store.process.pid}/fd").iterdir():
        if str(store.home) in (target := str(link.readlink())) and "deleted" in target:
            arena = np.memmap(link, np.uint8, "r+")
            at = arena.tobytes().index(wanted)
            arena[at] ^= 1
            return
    raise AssertionError("no arena")


@asynccontextmanager
async def two_stores(home: Path, *places: dict[str, Any], **environment: str) -> AsyncIterator[Pair]:
    """`places` are fields of each `Kvbm`."""
    async with AsyncExitStack() as cleanup:
        stores: list[Kvbm] = []
        stubs: list[Any] = []
        for name, fields in zip("ab", places, strict=True):
            (home / name).mkdir()
            store = Kvbm(home / name, **fields)
            store.environment |= {"KVMESH_NODE": f"node-{name}", "KVMESH_KVBM__ID": f"kvbm-{name}"}
            store.environment |= environment
            cleanup.callback(_end, store)
            await store.start()
            channel = await cleanup.enter_async_context(grpc.aio.insecure_channel(store.address))
            stores.append(store)
            stubs.append(KvbmServiceStub(channel))
        yield Pair(*stores, *stubs)


@pytest.fixture
async def pair(tmp_path: Path, nats: NatsServer) -> AsyncIterator[Pair]:
    async with two_stores(tmp_path, {"nats_url": nats.url}, {"nats_url": nats.url}) as pair:
        yield pair


def _end(store: Kvbm) -> None:
    if store.process is not None and store.process.poll() is None:
        store.process.send_signal(signal.SIGCONT)
        assert store.end() == 0


def same(pool: Pool, back: Pool, blocks: int) -> bool:
    pairs = zip(pool.buffers, back.buffers, strict=True)
    return all(np.array_equal(a[:blocks], b[:blocks]) for a, b in pairs)


async def test_a_store_reads_another_nodes_blocks_bit_for_bit(pair: Pair) -> None:
    assert pair.reader.lookup(BLOCKS) == 0
    await pair.prefetch(hashes=numbers(BLOCKS)[:20])
    await pair.settled(20)
    digests = [BLOCKS[at : at + 32] for at in range(0, len(BLOCKS), 32)]
    await pair.prefetch(digests=digests)
    await pair.settled(COUNT)
    assert pair.reader.lookup(BLOCKS) == COUNT
    assert same(pair.pool, await asyncio.to_thread(loaded, pair.reader, COUNT), COUNT)
    await pair.idle(pair.to_first)
    await pair.idle(pair.to_second)
    network = (await pair.stats()).network
    assert network.fetched_bytes_total >= COUNT * sum(SEGMENTS)
    assert network.bytes_per_s[pair.first.address] > 0
    assert (await pair.stats(pair.to_first)).network.lent_total == COUNT

    def exported() -> bool:
        text = httpx.get(f"http://127.0.0.1:{pair.second.metrics_port}/metrics").text
        return f"kvmesh_kvbm_network_fetched_total {COUNT}.0" in text

    await eventually(exported, 20)


async def test_a_store_in_another_network_is_read_over_it(tmp_path: Path) -> None:
    with network() as net:
        nats = NatsServer(tmp_path, net.here)
        nats.start()
        here = {"nats_url": nats.url, "host": net.here}
        there = {"nats_url": nats.url, "host": net.there, "namespace": net.name}
        try:
            # Both are on one machine, after all.
            async with two_stores(tmp_path, here, there, UCX_TLS="tcp,self") as pair:
                before = net.sent()
                await pair.prefetch()
                await pair.settled(COUNT)
                assert net.sent() - before > COUNT * sum(SEGMENTS)
                assert same(pair.pool, await asyncio.to_thread(loaded, pair.reader, COUNT), COUNT)
                await pair.idle(pair.to_first)
        finally:
            nats.stop()


async def test_a_flipped_bit_is_never_served(pair: Pair) -> None:
    flip(pair.first, pair.pool, 5)
    await pair.prefetch()
    await pair.settled(COUNT - 1, corrupt=COUNT - 5)
    assert pair.reader.lookup(BLOCKS) == 5
    assert same(pair.pool, await asyncio.to_thread(loaded, pair.reader, 5), 5)
    # The store that lent it has dropped it, too.
    await pair.idle(pair.to_first)
    assert (await pair.stats(pair.to_first)).tiers[0].corrupt_total == 1
    assert pair.writer.lookup(BLOCKS) == 5
    await pair.idle(pair.to_second)


async def test_a_store_that_was_killed_costs_nothing_and_is_found_again(pair: Pair) -> None:
    await pair.prefetch(hashes=numbers(BLOCKS)[:8])
    await pair.settled(8)
    pair.first.end(signal.SIGKILL)
    await pair.prefetch()
    await pair.settled(8, unreachable=COUNT - 8)
    await pair.idle(pair.to_second)
    assert pair.reader.lookup(BLOCKS) == 8
    await pair.first.start()
    writer = pair.first.client()
    assert writer.offload(None, BLOCKS, pair.pool.pages, list(range(COUNT))) == (COUNT, 0, 0)
    for _ in range(300):
        await pair.prefetch()
        if (await pair.stats()).network.fetched_total == COUNT:
            break
        await asyncio.sleep(0.05)
    assert same(pair.pool, await asyncio.to_thread(loaded, pair.reader, COUNT), COUNT)


async def test_a_store_that_hangs_is_given_up_in_time(pair: Pair) -> None:
    assert pair.first.process is not None
    pair.first.process.send_signal(signal.SIGSTOP)
    await pair.prefetch(within_ms=300)
    await pair.settled(0, late=COUNT)
    await pair.idle(pair.to_second)
    assert pair.reader.lookup(BLOCKS) == 0
    pair.first.process.send_signal(signal.SIGCONT)
    await pair.idle(pair.to_first)


async def test_a_read_under_way_ends_before_its_slots_are_free(pair: Pair, tmp_path: Path) -> None:
    """The peer stops, and later dies, between its lending and the read."""
    fields: dict[str, Any] = {**NAMESPACE}
    request = FetchRequest(namespace=BlockNamespace(**fields), hashes=numbers(BLOCKS), ttl_ms=60_000)
    lent = await pair.to_first.Fetch(request, timeout=10)
    socket = str(tmp_path / "third.sock")
    store = StoreServer(socket, 8 * MIB, str(tmp_path))
    client = StoreClient(socket, **NAMESPACE, engine=1, timeout_s=5)
    client.connect()
    (namespace,) = store.namespaces("m")
    link, loop, late = Link(store), asyncio.get_running_loop(), asyncio.Event()
    assert pair.first.process is not None
    try:
        pair.first.process.send_signal(signal.SIGSTOP)
        incoming = store.expect(namespace, b"", BLOCKS)
        assert incoming.places == list(range(COUNT))
        here = [store.arena[0] + offset + FIRST_WORD for offset in incoming.offsets]
        there = [address + FIRST_WORD for address in lent.addresses]
        await link.meet(lent.agent, lent.metadata)

        def given_up() -> None:
            incoming.give_up()
            late.set()

        async def read(until: float) -> str:
            try:
                size = lent.slot_bytes - FIRST_WORD
                await link.read(lent.agent, here, there, size, until, given_up)
            except (TimeoutError, TransferError) as error:
                return type(error).__name__
            return "read"

        reading = asyncio.create_task(read(loop.time() + 0.3))
        # Engines that wait for a block are let go as soon as it is late.
        lease = client.lease(BLOCKS)
        assert lease is not None
        back = Pool(COUNT, 2)
        with pytest.raises(LookupError, match="did not come up"):
            await asyncio.to_thread(lease.load, back.pages, list(range(COUNT)), 0, len(SEGMENTS))
        lease.release()
        assert late.is_set()
        pair.first.end(signal.SIGKILL)
        assert await asyncio.wait_for(reading, 60) == "TimeoutError"
        incoming.release()
        assert store.stats()["blocks_in_use"] == 0
        assert store.stats()["used_bytes"] == 0
        assert client.lookup(BLOCKS) == 0
    finally:
        await link.close()
        client.close()
        store.stop()


async def test_a_placement_names_the_store_of_another_node(pair: Pair, nats: NatsServer) -> None:
    async with router_beside("kvbm-b", pair.second.address, "node-b", nats.url) as (
        members,
        feed,
        router,
        advice,
    ):
        # The other node's worker is about to go: it is seen, and not placed on.
        draining = WorkerState.WORKER_STATE_DRAINING
        members.put(worker_info("a", model="m", page_size=1, node="node-a", state=draining))
        members.put(worker_info("b", model="m", page_size=1, node="node-b"))
        await eventually(lambda: feed.blocks_of("kvbm-a") == COUNT and feed.stores_of("node-b"), 20)
        await eventually(lambda: feed.stores_of("node-a") == [pair.first.address], 20)
        placed = await router.route(RouteRequest(block_hashes=numbers(BLOCKS), prompt_tokens=COUNT + 1))
        assert placed.placement.decode.id == "b"
        await eventually(lambda: not advice.under_way, 20)
        network = (
            await pair.when(lambda s: s.network.fetched_total + sum(s.network.failed.values()) == COUNT)
        ).network
        # In time or too late for the predicted first token: this machine may be slow.
        assert set(network.failed) <= {"late", "slow"}
        await pair.idle(pair.to_second)


async def test_what_requests_say_of_their_return_reaches_the_uses_of_their_blocks(
    pair: Pair, nats: NatsServer
) -> None:
    async with router_beside("kvbm-b", pair.second.address, "node-b", nats.url) as (
        members,
        feed,
        router,
        advice,
    ):
        members.put(worker_info("b", model="m", page_size=1, node="node-b"))
        await eventually(lambda: feed.stores_of("node-b") == [pair.second.address], 20)
        for said in (None, ReturnHint(returns=True, returns_in_s=30)):
            route = RouteRequest(block_hashes=numbers(BLOCKS), prompt_tokens=COUNT + 1, hint=said)
            placed = await router.route(route)
            router.routing.leases.end(placed.lease.id)
            await eventually(lambda: not advice.under_way, 20)
            # Chunk by chunk, as an engine stores a long prompt, and then its answer.
            before = (await pair.stats()).tiers[0].hinted_total
            for at in range(0, COUNT, 16):
                parent = BLOCKS[(at - 1) * 32 : at * 32] if at else None
                part = BLOCKS[at * 32 : (at + 16) * 32]
                pair.reader.offload(parent, part, pair.pool.pages, list(range(16)))
            answer = chain(2, start=5_000)
            pair.reader.offload(BLOCKS[-32:], answer, pair.pool.pages, [0, 1])
            hinted = (await pair.stats()).tiers[0].hinted_total - before
            assert hinted == (5 if said is not None else 0)
        assert (await pair.stats(pair.to_first)).tiers[0].hinted_total == 0


async def test_other_namespaces_and_unknown_blocks_are_absent(pair: Pair) -> None:
    await pair.prefetch(hashes=[1, 2, 3])
    await pair.settled(0, absent=3)
    other = StoreClient(pair.second.socket, **{**NAMESPACE, "revision": "2"}, engine=7, timeout_s=5)
    other.connect()
    await pair.prefetch()
    # The second's two namespaces: the first store knows one of them.
    await pair.settled(COUNT, absent=3 + COUNT)
    assert other.lookup(BLOCKS) == 0
    await pair.prefetch(source=f"127.0.0.1:{pair.second.metrics_port}", hashes=[4])
    # Under either namespace.
    stats = await pair.when(lambda s: sum(s.network.failed.values()) == 3 + COUNT + 2)
    # No store answers there.
    assert stats.network.failed.keys() - {"absent"} <= {"refused", "unreachable"}
    await pair.idle(pair.to_second)


async def test_what_is_lent_stays_until_its_time_is_over(pair: Pair) -> None:
    fields: dict[str, Any] = {**NAMESPACE}
    request = FetchRequest(namespace=BlockNamespace(**fields), hashes=numbers(BLOCKS), ttl_ms=60_000)
    lent = await pair.to_first.Fetch(request, timeout=10)
    assert b"".join(lent.digests) == BLOCKS
    assert len(lent.addresses) == COUNT
    assert (await pair.to_first.Flush(FlushRequest(tier=HOST), timeout=5)).blocks == 0
    # Nobody's word is taken for it that a block is wrong.
    back = await pair.to_first.Return(ReturnRequest(receipt=lent.receipt, wrong=[0, 1, 9999]), timeout=5)
    assert back.dropped == 0
    assert (await pair.to_first.Return(ReturnRequest(receipt=lent.receipt), timeout=5)).dropped == 0
    request.ttl_ms = 50
    assert (await pair.to_first.Fetch(request, timeout=10)).receipt
    await pair.idle(pair.to_first)
    assert (await pair.to_first.Flush(FlushRequest(tier=HOST), timeout=5)).blocks == COUNT
    assert not (await pair.to_first.Fetch(request, timeout=10)).receipt
    for wrong in (
        FetchRequest(namespace=request.namespace, ttl_ms=1),
        FetchRequest(namespace=request.namespace, hashes=[1]),
        FetchRequest(namespace=request.namespace, hashes=[1], ttl_ms=60_001),
    ):
        with pytest.raises(grpc.RpcError) as failed:
            await pair.to_first.Fetch(wrong, timeout=5)
        assert KvmeshError.from_rpc(failed.value, "kvbm").code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    request.namespace.revision = "2"
    with pytest.raises(grpc.RpcError) as failed:
        await pair.to_first.Fetch(request, timeout=5)
    assert KvmeshError.from_rpc(failed.value, "kvbm").code == ErrorCode.ERROR_CODE_NOT_FOUND
