"""The kvbm process as routers see it, by NATS, and operators, by gRPC and HTTP."""

from __future__ import annotations

import asyncio
import resource
import signal
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import numpy as np
import pytest

from fixtures.kvbm import MIB, SEGMENTS, Kvbm, Pool, chain, numbers
from fixtures.nats import NatsServer
from fixtures.waiting import eventually
from kvmesh.common.bus import Bus
from kvmesh.common.errors import KvmeshError
from kvmesh.common.events.columns import Kind, read
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.events_pb2 import KvEventBatch, ReplayRequest, SnapshotRequest
from kvmesh.v1.events_pb2_grpc import EventServiceStub
from kvmesh.v1.kvbm_pb2 import FlushRequest, GetStatsRequest, HintRequest, PinRequest, ReleaseRequest
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceStub


async def stats(channel: grpc.aio.Channel) -> Any:
    return await KvbmServiceStub(channel).GetStats(GetStatsRequest(), timeout=5)


async def test_stats_flush_and_metrics_tell_what_engines_did(kvbm: Kvbm, channel: grpc.aio.Channel) -> None:
    pool, client = Pool(16, 1), kvbm.client()
    blocks = chain(10)
    assert client.offload(None, blocks, pool.pages, list(range(10))) == (10, 0, 0)
    assert client.lookup(blocks + chain(1, 500)) == 10
    lease = client.lease(blocks)
    assert lease is not None
    lease.load(pool.pages, list(range(6, 16)), 0, 4)
    answer = await stats(channel)
    assert (answer.id, answer.node, answer.engines) == ("kvbm-0", "node-a", 1)
    (host,) = answer.tiers
    assert (host.tier, host.capacity_bytes, host.blocks, host.blocks_in_use) == (
        Tier.TIER_HOST,
        8 * MIB,
        10,
        10,
    )
    assert (host.stored_total, host.loaded_total, host.lookups_total, host.hits_total) == (10, 10, 11, 10)
    assert host.used_bytes >= 10 * sum(SEGMENTS)
    flush = KvbmServiceStub(channel).Flush
    assert (await flush(FlushRequest(), timeout=5)).blocks == 0, "all are in use"
    lease.release()
    assert (await flush(FlushRequest(tier=Tier.TIER_HOST), timeout=5)).blocks == 10
    assert client.lookup(blocks) == 0
    with pytest.raises(grpc.RpcError) as refused:
        await flush(FlushRequest(tier=Tier.TIER_NVME), timeout=5)
    assert KvmeshError.from_rpc(refused.value, "kvbm").code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT

    def exported() -> bool:
        text = httpx.get(f"http://127.0.0.1:{kvbm.metrics_port}/metrics").text
        wanted = [
            'stored_total{tier="host"} 10.0',
            'loaded_total{tier="host"} 10.0',
            'misses_total{tier="host"} 11.0',
            "engines 1.0",
            'latency_seconds_bucket{le="+Inf",operation="load",tier="host"} 1.0',
            'latency_seconds_count{operation="load",tier="host"} 1.0',
        ]
        return all(f"kvmesh_kvbm_{line}" in text for line in wanted)

    await eventually(exported, 5)


async def test_eviction_is_chosen_and_told(tmp_path: Path, nats: NatsServer) -> None:
    store = Kvbm(tmp_path, nats.url, host_bytes=2 * MIB)
    process = store.spawn(KVMESH_KVBM__EVICTION="lru")
    try:
        await eventually(lambda: process.poll() is None and (tmp_path / "kvbm.sock").exists(), 40)
        pool, client = Pool(64, 1), store.client()
        for start in range(0, 640, 64):
            client.offload(None, chain(64, start * 100), pool.pages, list(range(64)))
        async with grpc.aio.insecure_channel(store.address) as channel:
            answer = await KvbmServiceStub(channel).GetStats(
                GetStatsRequest(), timeout=40, wait_for_ready=True
            )
        (host,) = answer.tiers
        assert answer.eviction == "lru"
        assert not answer.HasField("nvme")
        assert host.evicted["room"] == host.evicted_total > 500
        assert (host.evicted["layout"], host.evicted["asked"]) == (0, 0)

        def exported() -> bool:
            text = httpx.get(f"http://127.0.0.1:{store.metrics_port}/metrics").text
            line = f'kvmesh_kvbm_evicted_total{{reason="room",tier="host"}} {float(host.evicted_total)}'
            return line in text

        await eventually(exported, 5)
    finally:
        store.end()


async def told(store: Kvbm, tier: int, blocks: bytes) -> None:
    """Wait until the store's present life has told that it has these blocks of a tier, and no others."""
    wanted = sorted(numbers(blocks))
    async with asyncio.timeout(10), grpc.aio.insecure_channel(store.address) as channel:
        stub = EventServiceStub(channel)
        while True:
            (response,) = [response async for response in stub.Snapshot(SnapshotRequest(), timeout=5)]
            # Not from the bus: it may have been connected only after the first batches.
            request = ReplayRequest(incarnation=response.batch.incarnation, from_sequence=1)
            replayed = [response.batch async for response in stub.Replay(request, timeout=5)]
            events = [event for batch in replayed for event in read(batch) if event.tier == tier]
            if sorted(number for event in events for number in event.hashes.tolist()) == wanted:
                return
            await asyncio.sleep(0.01)


async def test_a_restarted_store_has_its_blocks_from_the_disk(tmp_path: Path, nats: NatsServer) -> None:
    (home := tmp_path / "home").mkdir()
    store = Kvbm(home, nats.url, nvme=tmp_path / "nvme")
    try:
        await store.start()
        pool, client = Pool(32, 1), store.client()
        blocks = chain(32)
        assert client.offload(None, blocks, pool.pages, list(range(32))) == (32, 0, 0)
        assert store.end() == 0
        await store.start()
        await told(store, Tier.TIER_NVME, blocks)
        client, back = store.client(), Pool(32, 2)
        assert client.lookup(blocks) == 32
        lease = client.lease(blocks)
        assert lease is not None
        lease.load(back.pages, list(range(32)), 0, 4)
        lease.release()
        assert all(np.array_equal(a, b) for a, b in zip(pool.buffers, back.buffers, strict=True))
        async with grpc.aio.insecure_channel(store.address) as channel:
            answer = await stats(channel)
            host, nvme = answer.tiers
            assert (nvme.tier, nvme.capacity_bytes, nvme.blocks) == (Tier.TIER_NVME, 32 * MIB, 32)
            assert (answer.nvme.problem, answer.nvme.recovered, answer.nvme.promoted_total) == ("", 32, 32)
            assert (host.blocks, host.stored_total) == (32, 0)
            await told(store, Tier.TIER_HOST, blocks)
            flush = KvbmServiceStub(channel).Flush
            assert (await flush(FlushRequest(tier=Tier.TIER_NVME), timeout=5)).blocks == 32

        def exported() -> bool:
            text = httpx.get(f"http://127.0.0.1:{store.metrics_port}/metrics").text
            wanted = ["nvme_up 1.0", "nvme_promoted_total 32.0", 'blocks{tier="nvme"} 0.0']
            return all(f"kvmesh_kvbm_{line}" in text for line in wanted)

        await eventually(exported, 5)
    finally:
        if store.process is not None and store.process.poll() is None:
            store.end()


async def test_a_full_disk_is_told_and_costs_only_its_tier(tmp_path: Path, nats: NatsServer) -> None:
    (home := tmp_path / "home").mkdir()
    store = Kvbm(home, nats.url, host_bytes=2 * MIB, nvme=tmp_path / "nvme")
    await store.start()
    assert store.process is not None
    pool, client = Pool(64, 1), store.client()
    fresh = iter(range(0, 1 << 30, 1000))

    def write() -> None:
        client.offload(None, chain(64, next(fresh)), pool.pages, list(range(64)))

    async with grpc.aio.insecure_channel(store.address) as channel:

        async def problem() -> str:
            return (await stats(channel)).nvme.problem

        try:
            while (await stats(channel)).nvme.spilled_total < 64:
                write()
            limits = resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE)
            # Files cannot be written past the first page: as on a full disk.
            resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE, (4096, limits[1]))
            while not (why := await problem()):
                write()
            assert str(tmp_path / "nvme") in why
            assert client.lookup(chain(64, next(fresh))) == 0, "engines are still answered"

            def exported() -> bool:
                text = httpx.get(f"http://127.0.0.1:{store.metrics_port}/metrics").text
                return "kvmesh_kvbm_nvme_up 0.0" in text

            await eventually(exported, 5)
            resource.prlimit(store.process.pid, resource.RLIMIT_FSIZE, limits)
            while await problem():
                write()
            answer = await stats(channel)
            assert (answer.nvme.outages_total, answer.tiers[1].corrupt_total) == (1, 0)
            assert answer.nvme.recovered > 0
        finally:
            store.end(signal.SIGKILL)


async def test_pins_and_hints_come_over_grpc(kvbm: Kvbm, channel: grpc.aio.Channel) -> None:
    pool, client = Pool(64, 1), kvbm.client()
    blocks = chain(40)
    client.offload(None, blocks, pool.pages, list(range(40)))
    digests = [blocks[at : at + 32] for at in range(0, len(blocks), 32)]
    stub = KvbmServiceStub(channel)
    pinned = await stub.Pin(PinRequest(tenant="a", digests=digests, ttl_ms=60_000), timeout=5)
    assert pinned.blocks == 40
    assert pinned.bytes >= 40 * sum(SEGMENTS)
    assert (await stub.Flush(FlushRequest(), timeout=5)).blocks == 0
    refusals = {
        ErrorCode.ERROR_CODE_NOT_FOUND: PinRequest(tenant="a", model="other", digests=digests, ttl_ms=1),
        ErrorCode.ERROR_CODE_INVALID_ARGUMENT: PinRequest(tenant="a", digests=digests, ttl_ms=0),
    }
    for code, request in refusals.items():
        with pytest.raises(grpc.RpcError) as refused:
            await stub.Pin(request, timeout=5)
        assert KvmeshError.from_rpc(refused.value, "kvbm").code == code
    # A quarter of 8 MiB holds one and a half of these.
    too_much = PinRequest(tenant="a", digests=digests[:30] * 4, ttl_ms=60_000)
    with pytest.raises(grpc.RpcError) as refused:
        await stub.Pin(too_much, timeout=5)
    assert KvmeshError.from_rpc(refused.value, "kvbm").code == ErrorCode.ERROR_CODE_RATE_LIMITED
    other = await stub.Pin(PinRequest(tenant="b", digests=digests[:2], ttl_ms=1), timeout=5)
    assert other.blocks == 2
    answer = await stats(channel)
    assert answer.pins >= 1
    assert (await stub.Release(ReleaseRequest(receipt=pinned.receipt), timeout=5)).released
    assert not (await stub.Release(ReleaseRequest(receipt=pinned.receipt), timeout=5)).released
    hint = HintRequest(
        model="m", digests=digests[:3], session=7, returns=True, tool_call=True, returns_in_s=2.5
    )

    def use(part: bytes) -> None:
        lease = client.lease(part)
        assert lease is not None
        lease.release()

    hinted = (await stats(channel)).tiers[0].hinted_total
    assert client.lookup(blocks[: 5 * 32]) == 5
    use(blocks[: 5 * 32])
    assert (await stats(channel)).tiers[0].hinted_total == hinted, "nothing was said of them"
    await stub.Hint(hint, timeout=5)
    use(blocks[: 5 * 32])
    assert (await stats(channel)).tiers[0].hinted_total == hinted + 1
    by_hash = HintRequest(model="m", hashes=numbers(blocks)[8:9], returns=False)
    await stub.Hint(by_hash, timeout=5)
    use(blocks[7 * 32 : 9 * 32])
    assert (await stats(channel)).tiers[0].hinted_total == hinted + 2
    with pytest.raises(grpc.RpcError) as refused:
        await stub.Hint(HintRequest(hashes=[1], digests=digests[:1]), timeout=5)
    assert KvmeshError.from_rpc(refused.value, "kvbm").code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    client.hint(blocks, (None, False, False, None))
    with pytest.raises(grpc.RpcError) as refused:
        await stub.Hint(HintRequest(digests=[b"short"]), timeout=5)
    assert KvmeshError.from_rpc(refused.value, "kvbm").code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT


async def test_changes_reach_nats_in_sequence_and_snapshots_fit(
    kvbm: Kvbm, channel: grpc.aio.Channel, nats: NatsServer
) -> None:
    bus = Bus(nats.url, "test")
    batches: list[KvEventBatch] = []
    await bus.start()
    await bus.subscribe(
        "kvmesh.kv.store.*", lambda _subject, payload: batches.append(KvEventBatch.FromString(payload))
    )
    try:
        await eventually(lambda: batches, what="the store's own connection")
        pool, client = Pool(8, 1), kvbm.client()
        blocks = chain(6)
        hashes = numbers(blocks)
        client.offload(None, blocks[: 4 * 32], pool.pages, [0, 1, 2, 3])
        client.offload(blocks[3 * 32 : 4 * 32], blocks[4 * 32 :], pool.pages, [4, 5])

        def seen() -> list[tuple[int | None, list[int]]]:
            return [(event.parent, event.hashes.tolist()) for batch in batches for event in read(batch)]

        await eventually(lambda: sum(len(part) for _, part in seen()) == 6)
        assert [number for _, part in seen() for number in part] == hashes
        for parent, part in seen():
            before = hashes.index(part[0])
            assert parent == (hashes[before - 1] if before else None)
        assert {event.tier for batch in batches for event in read(batch)} == {Tier.TIER_HOST}
        assert {(b.holder_id, b.node, b.incarnation) for b in batches} == {
            ("kvbm-0", "node-a", batches[0].incarnation)
        }
        sequences = [batch.sequence for batch in batches]
        assert sequences == list(range(sequences[0], sequences[0] + len(sequences)))
        responses = EventServiceStub(channel).Snapshot(SnapshotRequest(holder_id="kvbm-0"), timeout=5)
        (snapshot,) = [response.batch async for response in responses]
        # One of no events may have come in between.
        assert snapshot.sequence >= sequences[-1]
        assert [event.hashes.tolist() for event in read(snapshot)] == [hashes]
        assert snapshot.digests == batches[-1].digests
        assert [digest.count for digest in snapshot.digests] == [6, 0, 0]
        await KvbmServiceStub(channel).Flush(FlushRequest(), timeout=5)

        def removed() -> list[int]:
            later = [event for b in batches if b.sequence > snapshot.sequence for event in read(b)]
            assert all(event.kind is Kind.REMOVED for event in later)
            return sorted(number for event in later for number in event.hashes.tolist())

        await eventually(lambda: removed() == sorted(hashes))
        assert batches[-1].digests[0].count == 0
    finally:
        await bus.close()


async def test_a_snapshot_of_another_holder_is_refused(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        async for _ in EventServiceStub(channel).Snapshot(SnapshotRequest(holder_id="kvbm-9"), timeout=5):
            pass
    assert KvmeshError.from_rpc(refused.value, "kvbm").code == ErrorCode.ERROR_CODE_NOT_FOUND


@pytest.mark.parametrize(
    ("environment", "advice"),
    [
        ({"KVMESH_KVBM__HOST_BYTES": str(1 << 50)}, "lower kvbm.host_bytes"),
        ({"KVMESH_KVBM__SHM_DIR": "/does/not/exist"}, "/does/not/exist"),
        ({"KVMESH_KVBM__SOCKET": "/tmp/" + "x" * 200}, "kvbm.socket"),
        ({"KVMESH_KVBM__ENABLED": "false"}, "kvbm.enabled"),
    ],
)
def test_what_cannot_work_is_said_at_start(environment: dict[str, str], advice: str, tmp_path: Path) -> None:
    process = Kvbm(tmp_path).spawn(**environment)
    _, stderr = process.communicate(timeout=40)
    assert process.returncode == 1
    last = stderr.decode().strip().splitlines()[-1]
    assert last.startswith("kvmesh kvbm: ")
    assert advice in last


async def test_a_second_store_on_one_socket_is_refused(kvbm: Kvbm) -> None:
    second = Kvbm(kvbm.home)
    process = second.spawn()
    _, stderr = await asyncio.to_thread(process.communicate, timeout=40)
    assert process.returncode == 1
    assert "another kvbm serves" in stderr.decode()
    assert kvbm.client().lookup(chain(1)) == 0
