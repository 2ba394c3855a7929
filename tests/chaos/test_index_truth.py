"""The index of a whole mesh equals what its workers and its store have, whatever NATS does."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from fixtures.link import Link
from fixtures.mesh import Mesh, running, wait_until
from fixtures.nats import NatsServer
from fixtures.ports import free_port
from kvmesh.cli.holders import registered_holders
from kvmesh.cli.home import Home
from kvmesh.cli.index_audit import Audit, Comparison, Result
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.client import Channels

pytestmark = pytest.mark.timeout(300)

# Seconds after which the index equals the truth once NATS is back.
RIGHT_S = 5.0


@pytest.fixture(scope="module")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, nats_server: NatsServer) -> Iterator[Mesh]:
    """Two prefill and two decode workers with so small pools that they evict all the time."""
    config = {
        "engine": {"kind": "mock", "mock": {"total_blocks": 600, "speedup": 20.0}},
        "workers": {"prefill": 2, "decode": 2},
        "nats": {"url": nats_server.url},
    }
    yield from running(tmp_path_factory.mktemp("truth"), config)


class Load:
    """Clients that talk to the mesh until told to stop."""

    def __init__(self, mesh: Mesh, clients: int = 6) -> None:
        self.mesh = mesh
        self.served = 0
        self.failures: list[str] = []
        self._stop = asyncio.Event()
        self._clients = [asyncio.create_task(self._talk(number)) for number in range(clients)]

    async def _talk(self, number: int) -> None:
        async with httpx.AsyncClient(timeout=30) as http:
            turn = 0
            while not self._stop.is_set():
                turn += 1
                text = f"client {number} turn {turn} " * (4 + turn % 40)
                body = {"model": "default", "prompt": text, "max_tokens": 8}
                answer = await http.post(f"{self.mesh.url}/v1/completions", json=body)
                self.served += 1
                if answer.status_code != 200:
                    self.failures.append(answer.text)

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.gather(*self._clients)


@pytest.fixture
async def audit(mesh: Mesh) -> AsyncIterator[Audit]:
    """As `kvmesh index verify` has it, without a process a look."""
    config, channels = Home(mesh.home).read_config(), Channels()
    yield Audit(channels, partial(registered_holders, config, channels))
    await channels.close()


async def right_soon(
    audit: Audit, routers: Sequence[str], holders: int, seconds: float = RIGHT_S
) -> list[Comparison]:
    """What routers have of so many holders, once all of it is true; fails after so many seconds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    found: list[Comparison] = []
    while len(found) < holders * len(routers) or not all(one.result is Result.EQUAL for one in found):
        assert loop.time() < deadline, [one for one in found if one.result is not Result.EQUAL]
        try:
            found = await audit.verify(routers)
        except KvmeshError:
            # The registry's bus is only just back, or a router not there yet.
            await asyncio.sleep(0.05)
    assert loop.time() < deadline
    return found


@pytest.mark.parametrize(("fault", "seconds"), [("down", 60.0), ("hanging", 5.0)])
async def test_requests_go_on_without_nats_and_the_index_is_right_again(
    mesh: Mesh, nats_server: NatsServer, audit: Audit, fault: str, seconds: float
) -> None:
    load = Load(mesh)
    await asyncio.sleep(1.0)
    await right_soon(audit, [mesh.router], holders=5)
    if fault == "down":
        await asyncio.to_thread(nats_server.stop, empty=True)
    else:
        nats_server.hang()
    before = load.served
    await asyncio.sleep(seconds)
    assert load.served > before
    await asyncio.to_thread(nats_server.start if fault == "down" else nats_server.resume)
    found = await right_soon(audit, [mesh.router], holders=5)
    await load.stop()
    assert not load.failures, load.failures[:3]
    # With NATS from elsewhere, workers are named after their machine, too.
    assert sorted("-".join(part.holder.split("-")[-2:]) for part in found) == [
        "decode-0",
        "decode-1",
        "kvbm-0",
        "prefill-0",
        "prefill-1",
    ]


@pytest.fixture
def link(nats_server: NatsServer) -> Iterator[Link]:
    link = Link(nats_server.port)
    link.start()
    yield link
    link.stop()


@asynccontextmanager
async def beside(mesh: Mesh, log: Path, module: str, **settings: str) -> AsyncIterator[None]:
    """Another process of the mesh, with settings of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVMESH_")} | settings
    command = [sys.executable, "-m", module, "--config", str(mesh.file)]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.parametrize("fault", ["cut", "slow"])
async def test_a_worker_and_a_router_that_are_cut_off_are_right_again(
    mesh: Mesh, link: Link, audit: Audit, tmp_path: Path, fault: str
) -> None:
    """All others stay connected; who is cut off, or hears all of it late, is still reached by requests."""
    port = str(free_port())
    routers = [mesh.router, f"127.0.0.1:{port}"]
    bus = {"KVMESH_NATS__URL": f"nats://127.0.0.1:{link.port}"}
    router = {"KVMESH_ROUTER__PORT": port, "KVMESH_ROUTER__METRICS_PORT": str(free_port())}
    async with (
        beside(mesh, tmp_path / "router.log", "kvmesh.router", **bus, **router),
        beside(mesh, tmp_path / "worker.log", "kvmesh.decode", **bus, KVMESH_WORKER__ID="apart"),
    ):
        await right_soon(audit, routers, holders=6, seconds=60)
        load = Load(mesh)
        await asyncio.sleep(1.0)
        if fault == "cut":
            link.cut()
        else:
            link.slow(0.5)
        before = load.served
        await asyncio.sleep(2.0)
        # It takes as long as a router is given to come to where the workers are.
        cut_off = await audit.verify(routers[1:])
        assert not [one for one in cut_off if one.result is Result.DIFFERENT]
        if fault == "cut":
            assert {one.holder for one in cut_off if one.result is Result.BEHIND} >= {"apart"}
        assert load.served > before
        link.mend()
        found = await right_soon(audit, routers, holders=6)
        await load.stop()
        assert not load.failures, load.failures[:3]
        assert [one.blocks for one in found if one.holder == "apart" and one.blocks > 0]


async def test_stats_and_dumps_agree(mesh: Mesh) -> None:
    load = Load(mesh, clients=1)
    await asyncio.sleep(0.5)
    await load.stop()

    def equal() -> bool:
        (stats,) = json.loads(mesh.command("index", "stats", "--json").stdout)
        (holder,) = (held for held in stats["holders"] if held["id"].endswith("decode-0"))
        dump = mesh.command("index", "dump", holder["id"]).stdout
        truth = mesh.command("index", "dump", holder["id"], "--truth").stdout
        lines = dump.splitlines()
        assert all(line.split()[:2] == [holder["id"], "device"] for line in lines)
        return holder["live"] and dump == truth and len(lines) == holder["blocks"]["device"] > 0

    await wait_until(equal, 10.0, "dump, truth and statistics to agree")


def test_what_cannot_be_asked_is_said(mesh: Mesh) -> None:
    run = mesh.command("index", "dump", "decode-9", check=False)
    assert run.returncode == 1
    assert "has no holder `decode-9`; it has: kvbm-0, " in run.stderr
    run = mesh.command("index", "verify", "--router", "127.0.0.1:1", check=False)
    assert run.returncode == 1
    assert "router 127.0.0.1:1" in run.stderr
