"""What operators, routers and planners ask of a store: over gRPC, and by `kvmesh kvbm`."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import numpy as np
import pytest

from fixtures.holders import worker_info
from fixtures.kvbm import MIB, NAMESPACE, SEGMENTS, Kvbm, Pool, chain, numbers
from fixtures.nats import NatsServer
from fixtures.ports import free_port
from fixtures.routing import router_beside
from fixtures.waiting import eventually
from kvmesh.common.errors import KvmeshError
from kvmesh.core import StoreClient, StoreServer
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.kvbm_pb2 import (
    EvictRequest,
    FlushRequest,
    GetStatsRequest,
    LocateRequest,
    PersistRequest,
    PrefetchRequest,
    VerifyRequest,
    VerifyResponse,
    WarmRequest,
)
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceStub
from kvmesh.v1.router_pb2 import RouteRequest

HOST, NVME = Tier.TIER_HOST, Tier.TIER_NVME
BLOCKS = chain(32)
DIGESTS = [BLOCKS[at : at + 32] for at in range(0, len(BLOCKS), 32)]


def fill_disk(directory: Path) -> None:
    """What a store leaves behind that kept `BLOCKS`."""
    socket, nvme = str(directory / "first.sock"), str(directory / "nvme")
    store = StoreServer(socket, 8 * MIB, str(directory), nvme_path=nvme, nvme_bytes=32 * MIB)
    client, pool = StoreClient(socket, **NAMESPACE, engine=1, timeout_s=5), Pool(32, 1)
    client.connect()
    assert client.offload(None, BLOCKS, pool.pages, list(range(32))) == (32, 0, 0)
    store.persist()
    store.stop()


@pytest.fixture
async def kept(tmp_path: Path, nats: NatsServer) -> AsyncIterator[Kvbm]:
    """A store that was restarted: its disk has `BLOCKS`, its memory nothing, and no engine has come yet."""
    (home := tmp_path / "home").mkdir()
    fill_disk(tmp_path)
    store = Kvbm(home, nats.url, nvme=tmp_path / "nvme")
    try:
        await store.start()
        yield store
    finally:
        if store.process is not None and store.process.poll() is None:
            store.end()


@pytest.fixture
async def stub(kept: Kvbm) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(kept.address) as channel:
        yield KvbmServiceStub(channel)


async def places(stub: Any) -> list[list[int]]:
    (located,) = (await stub.Locate(LocateRequest(model="m", digests=DIGESTS), timeout=5)).namespaces
    assert (located.model, located.revision, located.dtype, located.layout) == ("m", "1", "float32", "nhd")
    assert (located.rank, located.ranks) == (0, 1)
    return [list(block.tiers) for block in located.blocks]


async def promoted(stub: Any, count: int) -> None:
    for _ in range(500):
        if (await stub.GetStats(GetStatsRequest(), timeout=5)).nvme.promoted_total == count:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{count} blocks did not come up")


async def refused(call: Any) -> KvmeshError:
    with pytest.raises(grpc.RpcError) as failed:
        await call
    return KvmeshError.from_rpc(failed.value, "kvbm")


async def verify(stub: Any, **fields: Any) -> list[VerifyResponse]:
    return [answer async for answer in stub.Verify(VerifyRequest(**fields), timeout=20)]


def flip_on_disk(store: Kvbm) -> int:
    """Flip a bit in the middle of every slot of the disk tier that holds anything; how many."""
    path = store.home.parent / "nvme" / "slabs"
    slot = -(-sum(SEGMENTS) // 4096) * 4096 + 4096
    slabs = np.memmap(path, np.uint8, "r+")
    slots = slabs[: len(slabs) // slot * slot].reshape(-1, slot)
    used = slots[:, :8].any(axis=1)
    slots[used, slot // 2] ^= 1
    slabs.flush()
    return int(used.sum())


async def test_blocks_are_located_and_evicted_tier_by_tier(stub: Any) -> None:
    assert await places(stub) == [[NVME]] * 32
    assert (await stub.Evict(EvictRequest(tier=NVME, digests=DIGESTS[30:]), timeout=5)).blocks == 2
    assert await places(stub) == [[NVME]] * 30 + [[]] * 2
    assert (await stub.Evict(EvictRequest(tier=HOST, digests=DIGESTS), timeout=5)).blocks == 0
    assert not (await stub.Locate(LocateRequest(model="other", digests=DIGESTS), timeout=5)).namespaces
    for call in (
        stub.Evict(EvictRequest(tier=Tier.TIER_NETWORK, digests=DIGESTS), timeout=5),
        stub.Evict(EvictRequest(digests=DIGESTS), timeout=5),
        stub.Evict(EvictRequest(tier=HOST), timeout=5),
        stub.Locate(LocateRequest(digests=[b"short"]), timeout=5),
    ):
        assert (await refused(call)).code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT


async def test_a_prefetch_brings_a_chain_up_by_digests_or_hashes(stub: Any) -> None:
    by_hash = PrefetchRequest(model="m", hashes=numbers(BLOCKS)[:20], within_ms=60_000)
    answer = await stub.Prefetch(by_hash, timeout=5)
    assert (answer.here, answer.coming) == (0, 20)
    await promoted(stub, 20)
    by_digest = PrefetchRequest(digests=DIGESTS, tier=HOST, within_ms=60_000)
    answer = await stub.Prefetch(by_digest, timeout=5)
    assert (answer.here, answer.coming) == (20, 12)
    await promoted(stub, 32)
    assert await places(stub) == [[HOST, NVME]] * 32
    unknown = await stub.Prefetch(PrefetchRequest(hashes=[1, 2], within_ms=1), timeout=5)
    assert (unknown.here, unknown.coming) == (0, 0)
    for wrong in (
        PrefetchRequest(digests=DIGESTS),
        PrefetchRequest(digests=DIGESTS, within_ms=3_600_001),
        PrefetchRequest(within_ms=1),
        PrefetchRequest(digests=DIGESTS, hashes=[1], within_ms=1),
        PrefetchRequest(digests=DIGESTS, tier=NVME, within_ms=1),
    ):
        assert (await refused(stub.Prefetch(wrong, timeout=5))).code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT


async def test_a_verification_drops_bad_blocks_and_names_them(kept: Kvbm, stub: Any) -> None:
    answers = await verify(stub)
    assert [(a.tier, a.complete) for a in answers if a.complete] == [(HOST, True), (NVME, True)]
    assert sum(a.blocks for a in answers) == 32
    assert sum(a.bytes for a in answers) == 32 * sum(SEGMENTS)
    assert not any(a.corrupt or a.problem for a in answers)
    assert flip_on_disk(kept) == 32
    answers = await verify(stub, tier=NVME, bytes_per_s=1 << 40)
    bad = [(block.tier, block.digest) for a in answers for block in a.corrupt]
    assert sorted(bad) == sorted((NVME, digest) for digest in DIGESTS)
    assert await places(stub) == [[]] * 32
    nvme = (await stub.GetStats(GetStatsRequest(), timeout=5)).tiers[1]
    assert (nvme.blocks, nvme.corrupt_total) == (0, 32)
    with pytest.raises(grpc.RpcError) as failed:
        await verify(stub, tier=Tier.TIER_NETWORK)
    assert KvmeshError.from_rpc(failed.value, "kvbm").code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT


async def test_what_is_persisted_can_be_flushed_from_memory(kept: Kvbm, stub: Any) -> None:
    pool, client = Pool(8, 3), kept.client()
    fresh = chain(8, 5000)
    client.offload(None, fresh, pool.pages, list(range(8)))
    await stub.Persist(PersistRequest(), timeout=20)
    assert (await stub.Flush(FlushRequest(tier=HOST), timeout=5)).blocks == 8
    lease = client.lease(fresh)
    assert lease is not None
    back = Pool(8, 4)
    lease.load(back.pages, list(range(8)), 0, 4)
    lease.release()
    assert all(np.array_equal(a, b) for a, b in zip(pool.buffers, back.buffers, strict=True))


async def test_without_a_disk_nothing_is_persisted_or_warmed(kvbm: Kvbm, channel: grpc.aio.Channel) -> None:
    stub: Any = KvbmServiceStub(channel)
    error = await refused(stub.Persist(PersistRequest(), timeout=5))
    assert error.code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    assert "kvbm.nvme.path" in error.message
    answers = [(a.brought, a.to_come, a.left) async for a in stub.Warm(WarmRequest(), timeout=5)]
    assert answers == [(0, 0, 0)]
    with pytest.raises(grpc.RpcError) as failed:
        _ = [answer async for answer in stub.Warm(WarmRequest(model="nobody's"), timeout=5)]
    assert KvmeshError.from_rpc(failed.value, "kvbm").code == ErrorCode.ERROR_CODE_NOT_FOUND


async def test_a_placement_tells_the_store_what_will_be_asked_for(
    kept: Kvbm, stub: Any, nats: NatsServer
) -> None:
    async with router_beside("kvbm-0", kept.address, "node-a", nats.url) as (members, feed, router, advice):
        members.put(worker_info("a", model="m", page_size=1))
        await eventually(lambda: feed.blocks_of("kvbm-0") == 32)
        placed = await router.route(RouteRequest(block_hashes=numbers(BLOCKS), prompt_tokens=33))
        assert placed.expected.cached.nvme == 32
        await promoted(stub, 32)
        router.routing.leases.end(placed.lease.id)
        # All are in memory now: nothing is left to be told.
        await eventually(lambda: feed.blocks_of("kvbm-0") == 64)
        again = await router.route(RouteRequest(block_hashes=numbers(BLOCKS), prompt_tokens=33))
        assert again.expected.cached.nvme == 0
        assert not advice.under_way


async def test_the_scrubber_drops_bad_blocks_by_itself(tmp_path: Path, nats: NatsServer) -> None:
    (home := tmp_path / "home").mkdir()
    fill_disk(tmp_path)
    store = Kvbm(home, nats.url, nvme=tmp_path / "nvme")
    assert flip_on_disk(store) == 32
    try:
        await store.start()

        def exported() -> bool:
            text = httpx.get(f"http://127.0.0.1:{store.metrics_port}/metrics").text
            wanted = [
                'corrupt_total{tier="nvme"} 32.0',
                'scrubbed_total{tier="nvme"} 32.0',
                'scrub_passes_total{tier="nvme"} 1.0',
            ]
            return all(f"kvmesh_kvbm_{line}" in text for line in wanted)

        await eventually(exported, 20)
    finally:
        store.end()


class Cli:
    """`kvmesh kvbm` against a store and a router that knows it."""

    def __init__(self, store: Kvbm, router: str) -> None:
        self._store, self._router = store, router

    async def run(self, *arguments: str, code: int = 0) -> Any:
        options = [
            "--store",
            self._store.address,
            *(("--router", self._router) if "verify" in arguments else ()),
        ]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kvmesh.cli", "kvbm", *arguments, *options),
            env=os.environ | {"KVMESH_HOME": str(self._store.home), "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        output, errors = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == code, errors.decode()
        text = output.decode() or errors.decode()
        return json.loads(text) if "--json" in arguments else text


@pytest.fixture
async def cli(kept: Kvbm) -> AsyncIterator[Cli]:
    port, metrics = free_port(), free_port()
    router = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvmesh.router"),
        env=kept.environment
        | {"KVMESH_ROUTER__PORT": str(port), "KVMESH_ROUTER__METRICS_PORT": str(metrics)},
        stderr=subprocess.DEVNULL,
    )

    def ready() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{metrics}/ready", timeout=1).status_code == 200
        except httpx.TransportError:
            return False

    try:
        await eventually(ready, 40)
        yield Cli(kept, f"127.0.0.1:{port}")
    finally:
        router.kill()
        await router.wait()


async def test_the_command_line_verifies_blocks_and_index(kept: Kvbm, cli: Cli) -> None:
    fine = await cli.run("verify", "--json")
    assert fine["sound"]
    assert [(of["tier"], of["blocks"]) for of in fine["tiers"]] == [("host", 0), ("nvme", 32)]
    assert [(of["result"], of["blocks"]) for of in fine["index"]] == [("equal", 32)]
    assert flip_on_disk(kept) == 32
    bad = await cli.run("verify", "--json", code=1)
    assert not bad["sound"]
    assert sorted(of["digest"] for of in bad["tiers"][1]["corrupt"]) == sorted(d.hex() for d in DIGESTS)
    assert [(of["result"], of["blocks"]) for of in bad["index"]] == [("equal", 0)]
    again = await cli.run("verify", "--no-index", "--tier", "nvme")
    assert "nvme" in again
    cli._router = f"127.0.0.1:{free_port()}"
    lost = await cli.run("verify", "--json", code=1)
    assert [of["result"] for of in lost["index"]] == ["unreachable"]


async def test_the_command_line_warms_flushes_and_tells(kept: Kvbm, cli: Cli) -> None:
    assert await cli.run("warm", "m", "--json") == {"brought": 32, "failed": 0, "left": 0}
    told = await cli.run("stats", "--json")
    assert [(tier["tier"], tier["blocks"]) for tier in told["tiers"]] == [("host", 32), ("nvme", 32)]
    assert told["nvme"]["promoted"] == 32
    assert "kvbm-0" in await cli.run("stats")
    assert await cli.run("persist") == "all blocks are kept\n"
    assert await cli.run("flush", "--tier", "host", "--json") == {"blocks": 32}
    assert await cli.run("warm") == "32 blocks brought, 0 failed, 0 left where they are\n"
    assert "knows no model" in await cli.run("warm", "nobody's", code=1)
    assert "has no tier" in await cli.run("flush", "--tier", "network", code=1)
