"""The index of a whole mesh equals what its workers and its store have, whatever NATS does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fixtures.mesh import Mesh, running, wait_until
from fixtures.nats import NatsServer

pytestmark = pytest.mark.timeout(300)


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


def verify(mesh: Mesh, *arguments: str) -> tuple[int, dict[str, Any]]:
    run = mesh.command("index", "verify", "--json", *arguments, check=False)
    return run.returncode, json.loads(run.stdout)


@pytest.mark.parametrize("seconds", [5.0, pytest.param(60.0, marks=pytest.mark.slow)])
async def test_requests_go_on_without_nats_and_the_index_is_right_again(
    mesh: Mesh, nats_server: NatsServer, seconds: float
) -> None:
    load = Load(mesh)
    await asyncio.sleep(1.0)
    assert verify(mesh)[0] == 0, "under load"
    await asyncio.to_thread(nats_server.stop, empty=True)
    before = load.served
    await asyncio.sleep(seconds)
    assert load.served > before
    await asyncio.to_thread(nats_server.start)

    def right() -> bool:
        # Asking takes a moment itself; the index has been right since before the answer.
        code, found = verify(mesh)
        return code == 0 and all(part["result"] == "equal" for part in found["comparisons"])

    await wait_until(right, 10.0, "the index to equal the truth")
    await load.stop()
    assert not load.failures, load.failures[:3]
    # With NATS from elsewhere, workers are named after their machine, too.
    names = sorted(part["holder"] for part in verify(mesh)[1]["comparisons"])
    assert ["-".join(name.split("-")[-2:]) for name in names] == [
        "kvbm-0",
        "decode-0",
        "decode-1",
        "prefill-0",
        "prefill-1",
    ]


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
