"""Stores that share object storage: what one wrote the other has, checked, whoever dies, hangs or refuses."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import numpy as np
import pytest

from fixtures.holders import Members, worker_info
from fixtures.kvbm import MIB, NAMESPACE, SEGMENTS, Kvbm, Pool, chain, numbers
from fixtures.nats import NatsServer
from fixtures.ports import free_port
from fixtures.s3 import SECRET, S3Server
from fixtures.waiting import eventually
from kvmesh.common.bus import Bus
from kvmesh.common.config import ObjectTierConfig
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.client import Channels
from kvmesh.core import PrefixIndex, StoreClient, StoreServer
from kvmesh.kvbm.objects import options
from kvmesh.router.index import IndexFeed
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.kvbm_pb2 import (
    FlushRequest,
    GetStatsRequest,
    GetStatsResponse,
    LocateRequest,
    PersistRequest,
    PrefetchRequest,
    VerifyRequest,
    WarmRequest,
)
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceStub

COUNT = 64
BLOCKS = chain(COUNT)
NETWORK = Tier.TIER_NETWORK
Make = Callable[..., Awaitable[tuple[Kvbm, Any]]]


@pytest.fixture
async def make(tmp_path: Path, nats: NatsServer) -> AsyncIterator[Make]:
    """Starts a store by name, on a node of its own, with what is in its environment."""
    async with AsyncExitStack() as cleanup:

        async def made(name: str, environment: dict[str, str]) -> tuple[Kvbm, Any]:
            (home := tmp_path / name).mkdir()
            store = Kvbm(home, nats.url, host_bytes=8 * MIB)
            identity = {"KVMESH_NODE": f"node-{name}", "KVMESH_KVBM__ID": f"kvbm-{name}"}
            store.environment |= identity | environment
            cleanup.callback(_end, store)
            await store.start()
            channel = await cleanup.enter_async_context(grpc.aio.insecure_channel(store.address))
            return store, KvbmServiceStub(channel)

        yield made


def _end(store: Kvbm) -> None:
    if store.process is not None and store.process.poll() is None:
        store.end(signal.SIGKILL)


def archived(tmp_path: Path, url: str) -> Pool:
    """Put `BLOCKS` into object storage."""
    socket, pool = str(tmp_path / "archived.sock"), Pool(COUNT, 1)
    settings = options(ObjectTierConfig(url=url))
    store = StoreServer(socket, 8 * MIB, str(tmp_path), objects=settings)
    client = StoreClient(socket, **NAMESPACE, engine=1, timeout_s=20)
    client.connect()
    assert client.offload(None, BLOCKS, pool.pages, list(range(COUNT))) == (COUNT, 0, 0)
    store.persist()
    client.close()
    store.stop()
    return pool


def offloaded(store: Kvbm) -> Pool:
    pool, client = Pool(COUNT, 1), store.client()
    assert client.offload(None, BLOCKS, pool.pages, list(range(COUNT))) == (COUNT, 0, 0)
    return pool


def loaded(client: StoreClient) -> Pool:
    lease = client.lease(BLOCKS)
    assert lease is not None
    assert len(lease) == COUNT
    back = Pool(COUNT, 9)
    lease.load(back.pages, list(range(COUNT)), 0, len(SEGMENTS))
    lease.release()
    return back


def same(pool: Pool, back: Pool) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(pool.buffers, back.buffers, strict=True))


async def when(stub: Any, condition: Callable[[GetStatsResponse], bool]) -> GetStatsResponse:
    """A store's numbers, once they are so."""
    stats: GetStatsResponse = await stub.GetStats(GetStatsRequest(), timeout=10)
    for _ in range(3000):
        if condition(stats):
            return stats
        await asyncio.sleep(0.01)
        stats = await stub.GetStats(GetStatsRequest(), timeout=10)
    raise AssertionError(f"not in time: {stats}")


def exported(store: Kvbm) -> str:
    return httpx.get(f"http://127.0.0.1:{store.metrics_port}/metrics").text


async def prefetch(stub: Any, source: str = "") -> None:
    request = PrefetchRequest(model="m", hashes=numbers(BLOCKS), within_ms=60_000, source=source)
    await stub.Prefetch(request, timeout=10)


async def test_another_node_is_served_from_s3_when_the_first_is_gone(
    s3: S3Server, make: Make, nats: NatsServer
) -> None:
    await s3.start()
    first, to_first = await make("a", s3.environment())
    # It has listed the bucket while nothing was in it.
    second, to_second = await make("b", s3.environment())
    reader = second.client()
    pool = offloaded(first)
    await when(to_first, lambda stats: stats.objects.written_total == COUNT)
    first.end(signal.SIGKILL)
    assert reader.lookup(BLOCKS) == 0
    # The router may still name the store that is gone.
    await prefetch(to_second, source=first.address)
    await when(to_second, lambda stats: stats.objects.recalled_total == COUNT)
    assert reader.lookup(BLOCKS) == COUNT
    assert same(pool, await asyncio.to_thread(loaded, reader))
    # One that comes later knows at once, and tells whoever asks.
    third, to_third = await make("c", s3.environment())
    client = third.client()
    stats = await when(to_third, lambda stats: stats.objects.recovered == COUNT)
    assert [(of.tier, of.blocks) for of in stats.tiers] == [(Tier.TIER_HOST, 0), (NETWORK, COUNT)]
    digests = [BLOCKS[at : at + 32] for at in range(0, len(BLOCKS), 32)]
    located = await to_third.Locate(LocateRequest(model="m", digests=digests), timeout=10)
    assert [list(block.tiers) for block in located.namespaces[0].blocks] == [[NETWORK]] * COUNT
    await _seen_by_engines_everywhere(nats, third)
    await prefetch(to_third)
    await when(to_third, lambda stats: stats.objects.recalled_total == COUNT)
    assert same(pool, await asyncio.to_thread(loaded, client))
    verified = [answer async for answer in to_third.Verify(VerifyRequest(tier=NETWORK), timeout=60)]
    assert sum(answer.blocks for answer in verified) == COUNT
    assert not any(answer.corrupt or answer.problem for answer in verified)


async def _seen_by_engines_everywhere(nats: NatsServer, store: Kvbm) -> None:
    """What a store has in object storage counts for workers of all nodes, as the network tier."""
    bus, channels, members, index = Bus(nats.url, "test"), Channels(), Members(), PrefixIndex()
    await bus.start()
    feed = IndexFeed(index, members, bus, channels, "kvbm-c", store.address, "node-c")
    try:
        await feed.start()
        members.put(worker_info("elsewhere", model="m", page_size=1, node="node-z"))
        await eventually(lambda: feed.blocks_of("kvbm-c") == COUNT, 20)
    finally:
        await feed.close()
        await bus.close()
        await channels.close()


async def test_a_service_that_hangs_or_dies_costs_its_tier_and_nothing_else(s3: S3Server, make: Make) -> None:
    await s3.start()
    quick = {"KVMESH_KVBM__OBJECT__TIMEOUT_S": "1"}
    store, stub = await make("a", s3.environment() | quick)
    client = store.client()
    await when(stub, lambda stats: not stats.objects.problem)
    s3.hang()
    pool = offloaded(store)
    hung = await when(stub, lambda stats: bool(stats.objects.problem))
    assert "no answer within 1 s" in hung.objects.problem
    assert client.lookup(BLOCKS) == COUNT
    assert same(pool, await asyncio.to_thread(loaded, client))
    s3.go_on()
    await when(stub, lambda stats: not stats.objects.problem)
    s3.kill()
    with pytest.raises(grpc.RpcError) as refused:
        await stub.Persist(PersistRequest(), timeout=60)
    assert KvmeshError.from_rpc(refused.value, "kvbm").code == ErrorCode.ERROR_CODE_UNAVAILABLE
    await when(stub, lambda stats: bool(stats.objects.problem))
    await s3.start()
    await when(stub, lambda stats: not stats.objects.problem)
    await stub.Persist(PersistRequest(), timeout=60)
    # All but object storage is forgotten, unless it is named.
    assert (await stub.Flush(FlushRequest(), timeout=10)).blocks == COUNT
    await prefetch(stub)
    await when(stub, lambda stats: stats.objects.recalled_total == COUNT)
    assert same(pool, await asyncio.to_thread(loaded, client))
    await eventually(lambda: f"kvmesh_kvbm_object_recalled_total {COUNT}.0" in exported(store), 20)
    await stub.Flush(FlushRequest(tier=NETWORK), timeout=10)
    gone = await when(stub, lambda stats: stats.tiers[1].blocks == 0)
    assert gone.tiers[1].evicted["asked"] == COUNT


async def test_wrong_credentials_are_told_and_never_shown(s3: S3Server, make: Make) -> None:
    await s3.start()
    store, stub = await make("a", s3.environment(f"not-{SECRET}"))
    stats = await when(stub, lambda stats: bool(stats.objects.problem))
    assert "access denied" in stats.objects.problem
    offloaded(store)
    assert store.process is not None
    store.process.send_signal(signal.SIGTERM)
    _, errors = await asyncio.to_thread(store.process.communicate, timeout=60)
    assert b"object storage is out" in errors
    assert SECRET.encode() not in errors
    _, errors = await asyncio.to_thread(store.spawn(BLOCKS_KEY="").communicate, timeout=60)
    assert b"BLOCKS_KEY" in errors


async def test_memory_is_warmed_from_storage_that_is_not_the_stores_own(tmp_path: Path, make: Make) -> None:
    url = f"fs://{tmp_path}/objects"
    pool = await asyncio.to_thread(archived, tmp_path, url)
    store, stub = await make("b", {})
    for brought in (COUNT, 0):
        steps = [step async for step in stub.Warm(WarmRequest(source=url), timeout=60)]
        assert sum(step.brought for step in steps) == brought
        assert [(step.failed, step.left) for step in steps] == [(0, 0)] * len(steps)
    assert same(pool, await asyncio.to_thread(loaded, store.client()))
    for source, code in (
        ("fs:///proc/nothing", ErrorCode.ERROR_CODE_UNAVAILABLE),
        ("http://somewhere", ErrorCode.ERROR_CODE_INVALID_ARGUMENT),
    ):
        assert await refusal(stub, source) == code


async def test_memory_is_warmed_from_another_node(make: Make) -> None:
    first, _ = await make("a", {})
    pool = offloaded(first)
    second, to_second = await make("b", {})
    assert await warm(second, "--from", first.address) == {"brought": COUNT, "failed": 0, "left": 0}
    assert same(pool, await asyncio.to_thread(loaded, second.client()))
    nobody = f"127.0.0.1:{free_port()}"
    assert await refusal(to_second, nobody) == ErrorCode.ERROR_CODE_UNAVAILABLE


async def refusal(stub: Any, source: str) -> ErrorCode:
    with pytest.raises(grpc.RpcError) as failed:
        _ = [step async for step in stub.Warm(WarmRequest(source=source), timeout=30)]
    return KvmeshError.from_rpc(failed.value, "kvbm").code


async def warm(store: Kvbm, *arguments: str) -> Any:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvmesh.cli", "kvbm", "warm", "--json", "--store", store.address, *arguments),
        env=os.environ | {"KVMESH_HOME": str(store.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, errors.decode()
    return json.loads(output)
