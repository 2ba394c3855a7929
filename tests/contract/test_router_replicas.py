"""Two routers, each a process, and a real NATS between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import httpx
import pytest

from fixtures.holders import PAGE_SIZE, worker_info
from fixtures.nats import NatsServer
from fixtures.router import RouterMesh
from kvmesh.v1.common_pb2 import Role
from kvmesh.v1.router_pb2 import (
    GetStateResponse,
    LeaseReport,
    ReportRequest,
    RouteRequest,
    SelectRequest,
)


@pytest.fixture
async def mesh(tmp_path: Path, nats: NatsServer) -> AsyncIterator[RouterMesh]:
    """Two routers that hear each other, and four workers."""
    mesh = RouterMesh(tmp_path, nats, replicas=2, lease_ttl_s=60.0)
    await mesh.bus.start()
    for replica in range(2):
        mesh.start_router(replica)
    await mesh.register(worker_info("p", Role.ROLE_PREFILL))
    await mesh.register(worker_info("d", Role.ROLE_DECODE))
    await mesh.register(worker_info("a"))
    await mesh.register(worker_info("b"))
    for replica in range(2):
        await mesh.until(lambda s: len(s.workers) == 4 and in_step(s), replica=replica)
    yield mesh
    await mesh.close()


def in_step(state: GetStateResponse) -> bool:
    return len(state.replicas) == 1 and state.replicas[0].in_sync


def load(state: GetStateResponse) -> tuple[object, ...]:
    """What decisions count with."""
    workers = [(w.info.id, w.leases, w.queued_prefill_tokens, w.active_blocks) for w in state.workers]
    return state.lease_digest.SerializeToString(deterministic=True), workers


async def agreed(mesh: RouterMesh) -> GetStateResponse:
    """The state that both are in, as soon as that is so. How fast that must be: `tests/unit/router`."""
    async with asyncio.timeout(30):
        while True:
            here, there = await asyncio.gather(mesh.state(0), mesh.state(1))
            if load(here) == load(there):
                return here
            await asyncio.sleep(0.01)


async def report(mesh: RouterMesh, replica: int, lease: int, **said: object) -> list[int]:
    """The ids that are not known there."""
    reports = [LeaseReport(lease_id=lease, **said)]  # pyright: ignore[reportArgumentType] - fields by name
    answer = await mesh.routers[replica].Report(ReportRequest(reports=reports))
    return list(answer.unknown_lease_ids)


async def test_each_decides_on_the_load_of_both(mesh: RouterMesh) -> None:
    blocks = list(range(1, 200))
    prompt = RouteRequest(block_hashes=blocks, prompt_tokens=199 * PAGE_SIZE + 5)
    placed = await mesh.routers[0].Route(prompt)
    computes = placed.placement.prefill.id or placed.placement.decode.id
    state = await agreed(mesh)
    assert (state.lease_digest.leases, state.lease_digest.speculative_blocks) == (1, 199)
    again = await mesh.routers[1].Select(SelectRequest(route=prompt))
    assert (again.placement.prefill.id or again.placement.decode.id) == computes
    assert again.expected.cached.device == 199 * PAGE_SIZE
    other = RouteRequest(block_hashes=range(1_000, 1_199), prompt_tokens=199 * PAGE_SIZE + 5)
    elsewhere = await mesh.routers[1].Select(SelectRequest(route=other))
    assert (elsewhere.placement.prefill.id or elsewhere.placement.decode.id) != computes
    # Its holder goes on by the other router.
    assert await report(mesh, 1, placed.lease.id, prefill_done=True, output_tokens=1) == []
    await mesh.until(lambda s: not any(w.queued_prefill_tokens for w in s.workers))
    assert await report(mesh, 1, placed.lease.id, ended=True) == []
    await mesh.until(lambda s: s.leases == 0)
    await agreed(mesh)
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"http://127.0.0.1:{mesh.ports[1][1]}/metrics")).text
    assert "\nkvmesh_router_replicas 1.0" in text
    assert "\nkvmesh_router_foreign_leases 0.0" in text
    assert '\nkvmesh_router_replica_reports_total{result="taken"} ' in text


async def run_load(mesh: RouterMesh, replica: int, stop: asyncio.Event, leave: int) -> list[int]:
    """Requests one after another until `stop`; the last `leave` live on. Their leases."""
    chance = Random(replica)
    live: list[int] = []
    while not stop.is_set():
        start = chance.randrange(1, 1_000)
        request = RouteRequest(
            block_hashes=range(start, start + 8), prompt_tokens=8 * PAGE_SIZE + 5, policy="random"
        )
        live.append((await mesh.routers[replica].Route(request)).lease.id)
        await report(mesh, chance.randrange(2), chance.choice(live), prefill_done=True, output_tokens=3)
        if len(live) > leave:
            await report(mesh, chance.randrange(2), live.pop(0), ended=True)
    return live


async def test_they_agree_after_load_and_after_nats_was_away(mesh: RouterMesh, nats: NatsServer) -> None:
    for away in (False, True):
        stop = asyncio.Event()
        loads = [asyncio.create_task(run_load(mesh, replica, stop, leave=5)) for replica in range(2)]
        await asyncio.sleep(1.0)
        if away:
            nats.stop(empty=True)
            for replica in range(2):
                await mesh.until(lambda s: not s.bus_connected, replica=replica)
            await asyncio.sleep(0.5)
            nats.start()
            for replica in range(2):
                await mesh.until(lambda s: s.bus_connected, replica=replica)
        stop.set()
        live = [lease for leases in await asyncio.gather(*loads) for lease in leases]
        state = await agreed(mesh)
        assert state.lease_digest.lease_sum == sum(live) % 2**64
        for lease in live:
            await report(mesh, 0, lease, ended=True)
        assert (await agreed(mesh)).leases == 0


async def test_one_that_is_killed_comes_back_and_knows_all(mesh: RouterMesh) -> None:
    request = RouteRequest(block_hashes=[1, 2, 3], prompt_tokens=60, policy="random")
    kept, silent = [(await mesh.routers[0].Route(request)).lease.id for _ in range(2)]
    own = (await mesh.routers[1].Route(request)).lease.id
    assert (await agreed(mesh)).leases == 3
    mesh.stop_router()
    # The one whose holder speaks here lives on, the other one's holder is not there.
    assert await report(mesh, 1, kept, output_tokens=4) == []
    await mesh.until(lambda s: not s.replicas and s.leases == 2, replica=1)
    assert await report(mesh, 1, silent, ended=True) == [silent]
    mesh.start_router()
    await mesh.until(lambda s: s.leases == 2 and in_step(s))
    state = await agreed(mesh)
    assert state.lease_digest.lease_sum == (kept + own) % 2**64
    for lease in (kept, own):
        assert await report(mesh, 0, lease, ended=True) == []
    assert (await agreed(mesh)).leases == 0
    # Goodbye is heard at once.
    mesh.stop_router(15)
    await mesh.until(lambda s: not s.replicas, timeout=2.0, replica=1)
