"""A role's process: ports, readiness, draining and signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from kvmesh.common.config import Config
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.client import Channels
from kvmesh.common.lifecycle import RoleServer
from kvmesh.v1.router_pb2 import RouteRequest, RouteResponse
from kvmesh.v1.router_pb2_grpc import (
    RouterServiceServicer,
    RouterServiceStub,
    add_RouterServiceServicer_to_server,
)

PROCESS = """
import asyncio, sys
from kvmesh.common import telemetry
from kvmesh.common.config import Config
from kvmesh.common.lifecycle import RoleServer, run
from kvmesh.common.errors import invalid

async def main():
    mode = sys.argv[1]
    if mode == "error":
        raise invalid("set `model.id` to something that exists")
    config = Config()
    telemetry.setup("router", config)
    config.router.port = config.router.metrics_port = 0
    server = RoleServer("router", config, config.router)
    await server.start()
    print("up", flush=True)
    try:
        if mode == "loading":
            await asyncio.sleep(3600)
        await server.wait_for_stop()
        print("stopping", flush=True)
        if mode == "stuck":
            await asyncio.sleep(3600)
    finally:
        await server.stop(0)
        print("clean", flush=True)

run(main)
"""


class Slow(RouterServiceServicer):
    def __init__(self) -> None:
        self.entered = asyncio.Event()

    async def Route(self, request: RouteRequest, context: grpc.aio.ServicerContext) -> RouteResponse:
        self.entered.set()
        await asyncio.sleep(float(request.model or 0))
        return RouteResponse(policy="done")


@pytest.fixture
async def server() -> AsyncIterator[tuple[RoleServer, Slow]]:
    config = Config()
    config.router.port = config.router.metrics_port = 0
    role_server, servicer = RoleServer("router", config, config.router), Slow()
    role_server.add_service("kvmesh.v1.RouterService", add_RouterServiceServicer_to_server, servicer)
    await role_server.start()
    yield role_server, servicer
    await role_server.stop(0)


@pytest.mark.parametrize("key", ["port", "metrics_port"])
async def test_a_taken_port_is_named_with_its_key(server: tuple[RoleServer, Slow], key: str) -> None:
    role_server, _ = server
    config = Config()
    config.worker.port = config.worker.metrics_port = 0
    taken = role_server.port if key == "port" else role_server.metrics_port
    setattr(config.worker, key, taken)
    other = RoleServer("prefill", config, config.worker)
    with pytest.raises(KvmeshError) as caught:
        await other.start()
    assert f":{taken}:" in caught.value.message
    assert f"`worker.{key}`" in caught.value.message
    await other.stop(0)


async def test_health_and_metrics_over_http(server: tuple[RoleServer, Slow]) -> None:
    role_server, _ = server
    base = f"http://127.0.0.1:{role_server.metrics_port}"
    async with httpx.AsyncClient(base_url=base) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 503
        role_server.set_ready(True)
        assert (await client.get("/ready")).status_code == 200
        metrics = await client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert "kvmesh_router_rpc_in_flight" in metrics.text
    assert "process_resident_memory_bytes" in metrics.text


@pytest.mark.parametrize("asked", [False, True])
async def test_reflection_names_the_services_where_it_is_asked_for(asked: bool) -> None:
    config = Config()
    config.router.port = config.router.metrics_port = 0
    config.router.reflection = asked
    server = RoleServer("router", config, config.router)
    server.add_service("kvmesh.v1.RouterService", add_RouterServiceServicer_to_server, Slow())
    await server.start()
    try:
        with grpc.insecure_channel(server.address) as channel:
            described = ProtoReflectionDescriptorDatabase(channel)
            if asked:
                names = set(await asyncio.to_thread(described.get_services))
                assert {"kvmesh.v1.RouterService", "grpc.health.v1.Health"} <= names
            else:
                with pytest.raises(grpc.RpcError) as caught:
                    await asyncio.to_thread(described.get_services)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop(0)


async def test_stop_waits_for_calls_and_no_longer(server: tuple[RoleServer, Slow]) -> None:
    role_server, servicer = server
    channels = Channels()
    call = RouterServiceStub(channels.get(role_server.address)).Route(RouteRequest(model="0.3"))
    waiting = asyncio.create_task(_outcome(call))
    await servicer.entered.wait()
    started = time.monotonic()
    await role_server.stop(10)
    assert await waiting == "done"
    assert 0.1 < time.monotonic() - started < 5
    await channels.close()


async def test_stop_cancels_what_outlasts_the_drain(server: tuple[RoleServer, Slow]) -> None:
    role_server, servicer = server
    channels = Channels()
    call = RouterServiceStub(channels.get(role_server.address)).Route(RouteRequest(model="30"), timeout=20)
    waiting = asyncio.create_task(_outcome(call))
    await servicer.entered.wait()
    started = time.monotonic()
    await role_server.stop(0.3)
    assert time.monotonic() - started < 3
    assert await waiting != "done"
    await channels.close()


async def test_health_watchers_do_not_hold_up_a_stop(server: tuple[RoleServer, Slow]) -> None:
    role_server, _ = server
    role_server.set_ready(True)
    channels = Channels()
    # The published stubs know the synchronous API only.
    health: Any = health_pb2_grpc.HealthStub(channels.get(role_server.address))
    seen: list[int] = []

    async def watch() -> None:
        request = health_pb2.HealthCheckRequest(service="kvmesh.v1.RouterService")
        try:
            async for answer in health.Watch(request):
                seen.append(answer.status)
        except grpc.RpcError:
            return

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0.2)
    started = time.monotonic()
    await role_server.stop(10)
    assert time.monotonic() - started < 2
    await watching
    # Callers were told before the connection went.
    assert seen == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
    await channels.close()


async def test_stop_is_idempotent(server: tuple[RoleServer, Slow]) -> None:
    role_server, _ = server
    await role_server.stop(0)
    await role_server.stop(0)


async def _outcome(call: grpc.aio.UnaryUnaryCall[RouteRequest, RouteResponse]) -> str:
    try:
        return (await call).policy
    except grpc.RpcError as error:
        return str(error)


@contextmanager
def spawn(tmp_path: Path, mode: str) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    with subprocess.Popen(
        [sys.executable, str(script), mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_in_order(tmp_path: Path, number: signal.Signals) -> None:
    with spawn(tmp_path, "wait") as process:
        assert read_line(process) == "up\n"
        os.kill(process.pid, number)
        code, out, _ = finish(process)
    assert (code, out) == (0, "stopping\nclean\n")


def test_a_signal_while_loading_cleans_up(tmp_path: Path) -> None:
    with spawn(tmp_path, "loading") as process:
        assert read_line(process) == "up\n"
        os.kill(process.pid, signal.SIGTERM)
        assert finish(process)[:2] == (0, "clean\n")


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    with spawn(tmp_path, "stuck") as process:
        assert read_line(process) == "up\n"
        os.kill(process.pid, signal.SIGINT)
        assert read_line(process) == "stopping\n"
        os.kill(process.pid, signal.SIGINT)
        code, out, _ = finish(process)
    assert (code, out) == (128 + signal.SIGINT, "")


def test_an_error_is_one_line(tmp_path: Path) -> None:
    with spawn(tmp_path, "error") as process:
        code, out, err = finish(process)
    assert (code, out) == (1, "")
    assert err.splitlines() == ["kvmesh process: set `model.id` to something that exists"]
