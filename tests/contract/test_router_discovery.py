"""Routers that register are found, and those that are gone are not: real processes on real NATS."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fixtures.nats import NatsServer
from fixtures.ports import free_port
from fixtures.router import RouterMesh
from fixtures.waiting import eventually
from kvmesh.common.bus import Bus
from kvmesh.common.config import load_config
from kvmesh.common.discovery.routers import RouterDirectory, make_router_directory, router_id

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
async def mesh(tmp_path: Path, nats: NatsServer) -> AsyncIterator[RouterMesh]:
    mesh = RouterMesh(tmp_path, nats, replicas=2)
    yield mesh
    await mesh.close()


@pytest.fixture
async def directory(mesh: RouterMesh) -> AsyncIterator[RouterDirectory]:
    """A process that looks for routers."""
    bus = Bus(mesh.config.nats.effective_url(), "reader")
    directory = make_router_directory(mesh.config, bus)
    await bus.start()
    await directory.start()
    yield directory
    await directory.close()
    await bus.close()


def address(mesh: RouterMesh, replica: int) -> str:
    return f"127.0.0.1:{mesh.ports[replica][0]}"


async def found(directory: RouterDirectory, *addresses: str, within: float = 30.0) -> None:
    await eventually(lambda: set(directory.addresses) == set(addresses), within, f"{addresses} to be found")


async def test_routers_come_and_go(mesh: RouterMesh, directory: RouterDirectory) -> None:
    changes: list[tuple[str, ...]] = []
    directory.subscribe(lambda: changes.append(directory.addresses))
    assert directory.addresses == ()
    first, second = address(mesh, 0), address(mesh, 1)
    mesh.start_router(0)
    await found(directory, first)
    mesh.start_router(1)
    await found(directory, first, second)
    assert await asyncio.to_thread(mesh.stop_router, signal.SIGTERM, 0) == 0
    # It says so itself: nobody waits for its lease to run out.
    await found(directory, second, within=1.0)
    mesh.start_router(0)
    await found(directory, first, second)
    await asyncio.to_thread(mesh.stop_router, signal.SIGKILL, 1)
    await found(directory, first, within=mesh.config.discovery.ttl_s + 2.0)
    assert changes[0] == (first,)
    assert len(changes) == 5


async def test_while_nats_is_away_routers_stay(
    mesh: RouterMesh, directory: RouterDirectory, nats: NatsServer
) -> None:
    mesh.start_router(0)
    await found(directory, address(mesh, 0))
    nats.stop(empty=True)
    await asyncio.sleep(mesh.config.discovery.ttl_s + 0.5)
    assert directory.addresses == (address(mesh, 0),)
    nats.start()
    mesh.start_router(1)
    await found(directory, address(mesh, 0), address(mesh, 1))


async def test_what_others_write_there_is_no_router(mesh: RouterMesh, directory: RouterDirectory) -> None:
    mesh.start_router(0)
    await found(directory, address(mesh, 0))
    bus = mesh.bus
    await bus.start()
    await eventually(lambda: bus.connected)
    bus.publish("$KV.kvmesh-routers.bad", b"\xff\xff\xff")
    bus.publish("$KV.kvmesh-routers.other", b"")
    await asyncio.sleep(0.3)
    assert directory.addresses == (address(mesh, 0),)


def test_configured_addresses_are_taken_as_they_are() -> None:
    bus = Bus("nats://127.0.0.1:1", "reader")
    several = load_config(None, {"router": {"address": ["a:1", "b:2"]}})
    assert make_router_directory(several, bus).addresses == ("a:1", "b:2")
    alone = load_config(None, {"discovery": {"kind": "static", "file": "workers.yaml"}})
    assert make_router_directory(alone, bus).addresses == ("127.0.0.1:8100",)
    assert router_id("rack-7.example", 8100) == "router-rack-7-example-8100"


async def kvmesh(mesh: RouterMesh, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvmesh.cli", *arguments, "--config", str(mesh.file)]
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, check=False
    )


async def test_commands_find_them(mesh: RouterMesh, directory: RouterDirectory) -> None:
    mesh.start_router(0)
    mesh.start_router(1)
    await found(directory, address(mesh, 0), address(mesh, 1))
    done = await kvmesh(mesh, "router", "set", "max_waiting", "7", "--json")
    assert done.returncode == 0, done.stderr
    said = {one["router"]: one["max_waiting"] for one in json.loads(done.stdout)}
    assert said == {address(mesh, 0): 7, address(mesh, 1): 7}
    done = await kvmesh(mesh, "index", "stats", "--json")
    assert len(json.loads(done.stdout)) == 2, done.stderr


async def test_set_says_who_took_it_and_fails_where_one_did_not(mesh: RouterMesh) -> None:
    mesh.start_router(0)
    await mesh.state()
    alive, dead = address(mesh, 0), f"127.0.0.1:{free_port()}"
    change = ("router", "set", "policy", "round-robin", "--router", alive, "--router", dead)
    done = await kvmesh(mesh, *change, "--json")
    assert done.returncode == 1
    taken, failed = json.loads(done.stdout)
    assert (taken["router"], taken["policy"]) == (alive, "round-robin")
    assert failed["router"] == dead
    assert dead in failed["error"]
    done = await kvmesh(mesh, *change)
    assert done.returncode == 1
    assert f"router {alive}: policy round-robin" in done.stdout
    assert f"router {dead}: not changed:" in done.stderr
    assert (await mesh.state()).policy == "round-robin"
    # What no router takes is an error like any other.
    done = await kvmesh(mesh, "router", "set", "policy", "kvv", "--router", alive)
    assert (done.returncode, done.stdout) == (1, "")
    assert "unknown policy `kvv`" in done.stderr
