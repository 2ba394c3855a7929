"""A router that dies under streaming load: its replica goes on, no request fails, nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from fixtures.mesh import Mesh, wait_for, wait_until
from fixtures.ports import free_port
from kvmesh.cli.app import app
from kvmesh.common.errors import KvmeshError

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def mesh(replicated_mesh: Mesh) -> Mesh:
    return replicated_mesh


class Load:
    """Clients that stream answers, one after another, until they are stopped."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stopped = asyncio.Event()
        self._clients: list[asyncio.Task[None]] = []
        self.served = 0
        self.failures: list[str] = []
        self.policies: set[str] = set()

    def start(self, clients: int) -> None:
        self._clients = [asyncio.create_task(self._client(number)) for number in range(clients)]

    async def stop(self) -> None:
        self._stopped.set()
        await asyncio.gather(*self._clients)

    async def more(self, requests: int) -> None:
        """Until so many more have been served."""
        wanted = self.served + requests
        await wait_until(lambda: self.served >= wanted or bool(self.failures), 60, "requests to be served")

    async def _client(self, number: int) -> None:
        async with httpx.AsyncClient(timeout=60) as http:
            while not self._stopped.is_set():
                body = {
                    "model": "default",
                    "prompt": f"client {number} says {self.served}",
                    "max_tokens": 60,
                    "stream": True,
                    "kvmesh": {"explain": True},
                }
                async with http.stream("POST", f"{self._url}/v1/completions", json=body) as answer:
                    lines = [line async for line in answer.aiter_lines() if line]
                if lines[-1:] != ["data: [DONE]"] or any('"error"' in line for line in lines):
                    self.failures.append("\n".join(lines[-3:]))
                    return
                said = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
                self.policies |= {chunk["kvmesh"]["policy"] for chunk in said if "kvmesh" in chunk}
                self.served += 1


def in_step(mesh: Mesh) -> bool:
    """Whether both routers answer and hear each other."""
    routers = mesh.status()["routers"]
    heard = [router.get("replicas", []) for router in routers]
    return len(routers) == 2 and all(len(of) == 1 and of[0]["in_sync"] for of in heard)


async def gauge(url: str, name: str) -> float:
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"{url}/metrics")).text
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + " "))


async def test_a_router_killed_under_load_fails_no_request(mesh: Mesh) -> None:
    await wait_until(lambda: in_step(mesh), 60, "the routers to hear each other")
    load = Load(mesh.url)
    load.start(8)
    for process in ("router", "router-1"):
        await load.more(16)
        old = await asyncio.to_thread(mesh.kill, process)
        await load.more(16)

        def back(process: str = process, old: int = old) -> bool:
            return mesh.pid(process) not in (old, None) and in_step(mesh)

        await wait_until(back, 60, f"{process} to be back")
    await load.more(16)
    await load.stop()
    assert load.failures == []
    assert load.policies == {"kv"}, "every request was placed by a router"
    await wait_until(mesh.idle, 10, "every request, block, transfer and lease to be gone")
    metrics_port = mesh.config["router"]["metrics_port"]
    assert await gauge(f"http://127.0.0.1:{metrics_port}", "kvmesh_router_leases") == 0
    assert await gauge(f"http://127.0.0.1:{metrics_port}", "kvmesh_router_foreign_leases") == 0
    assert await gauge(f"http://127.0.0.1:{metrics_port}", "kvmesh_router_leaked_leases") == 0


async def test_a_router_that_comes_later_is_used_and_a_killed_one_leaves(mesh: Mesh, tmp_path: Path) -> None:
    await wait_until(lambda: in_step(mesh), 60, "the routers to hear each other")
    load = Load(mesh.url)
    load.start(8)
    port, metrics_port = free_port(), free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVMESH_")} | {
        "KVMESH_ROUTER__PORT": str(port),
        "KVMESH_ROUTER__METRICS_PORT": str(metrics_port),
    }
    command = [sys.executable, "-m", "kvmesh.router", "--config", str(mesh.file)]
    with (tmp_path / "router.log").open("wb") as log:
        later = await asyncio.create_subprocess_exec(*command, env=environment, stderr=log)
    try:

        def shown() -> list[str]:
            return [router["address"] for router in mesh.status()["routers"] if "error" not in router]

        address = f"127.0.0.1:{port}"
        await wait_until(lambda: address in shown(), 60, "the later router to be found")
        await load.more(32)
        placed = await gauge(f"http://127.0.0.1:{metrics_port}", "kvmesh_router_decision_seconds_count")
        assert placed >= 8, "it is asked as the others are"
        later.kill()
        await later.wait()
        await load.more(32)
        await wait_until(lambda: in_step(mesh), 30, "the dead router to have left")
    finally:
        if later.returncode is None:
            later.kill()
            await later.wait()
    await load.more(16)
    await load.stop()
    assert load.failures == []
    assert load.policies == {"kv"}, "every request was placed by a router"
    await wait_until(mesh.idle, 10, "every request, block, transfer and lease to be gone")


def test_commands_ask_every_router(mesh: Mesh) -> None:
    wait_for(lambda: in_step(mesh), 60, "the routers to hear each other")

    def run(*arguments: str) -> str:
        home = {"KVMESH_HOME": str(mesh.home), "COLUMNS": "200"}
        result = CliRunner().invoke(app, list(arguments), env=home, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    # One after another, they are placed by both.
    for _ in range(2):
        request_id = mesh.chat("why?", kvmesh={"explain": True})["kvmesh"]["request_id"]
        (decision,) = json.loads(run("router", "explain", request_id, "--json"))
        assert decision["request_id"] == request_id
    settings = json.loads(run("router", "set", "max_waiting", "77", "--json"))
    assert [router["max_waiting"] for router in settings] == [77, 77]
    assert len(json.loads(run("index", "stats", "--json"))) == 2
    wait_for(lambda: run("status").count("in step") == 2, 10, "both routers to be shown in step")
    assert [p["name"] for p in mesh.status()["processes"] if p["role"] == "router"] == ["router", "router-1"]
    # It is running as it is wanted, and not with another number of routers.
    up = ("up", "--config", str(mesh.file), "--detach", "--routers")
    assert "already running" in run(*up, "2")
    with pytest.raises(KvmeshError, match="differs in `router`"):
        run(*up, "3")
