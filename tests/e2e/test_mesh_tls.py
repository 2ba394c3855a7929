"""A mesh whose processes speak TLS with one another, and ask one another for certificates."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import nats
import nats.errors
import pytest
from cryptography import x509

from fixtures.certificates import NAME, Authority
from fixtures.mesh import KVMESH, Mesh, running, wait_for
from kvmesh.v1.router_pb2 import GetStateRequest
from kvmesh.v1.router_pb2_grpc import RouterServiceStub

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    authority = Authority(tmp_path_factory.mktemp("authority"))
    authority.issue()
    return authority


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Mesh]:
    config = {"engine": {"kind": "mock"}, "tls": authority.config(server_name=NAME)}
    yield from running(tmp_path_factory.mktemp("tls"), config)


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def grpc_ports(mesh: Mesh) -> dict[str, int]:
    """Of every process that serves gRPC, by name."""
    return {p["name"]: port_of(p["address"]) for p in mesh.status()["processes"] if p["name"] != "nats"}


def serial(mesh: Mesh, authority: Authority, name: str, port: int) -> int:
    """Of the certificate that a new connection is shown."""
    config = authority.config()
    context = ssl.create_default_context(cafile=config["ca"])
    context.load_cert_chain(config["cert"], config["key"])
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        if name == "nats":
            assert connection.recv(4096).startswith(b"INFO ")
        with context.wrap_socket(connection, server_hostname=NAME) as secured:
            shown = secured.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


async def router_says(port: int, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    address, options = f"127.0.0.1:{port}", [("grpc.ssl_target_name_override", NAME)]
    channel = (
        grpc.aio.insecure_channel(address)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, options=options)
    )
    async with channel:
        stub: Any = RouterServiceStub(channel)
        try:
            await stub.GetState(GetStateRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_the_mesh_answers(mesh: Mesh) -> None:
    answer = mesh.chat("Hello", kvmesh={"explain": True})
    assert answer["kvmesh"]["placement"]["mode"] == "disaggregated"
    assert answer["kvmesh"]["policy"] == "kv"
    status = mesh.status()
    assert status["nats"]["connected"]
    assert status["router"]["bus_connected"]
    assert "error" not in status["kvbm"][0]
    assert all(worker["routed"] for worker in status["workers"])


def test_commands_use_the_meshs_certificates(mesh: Mesh) -> None:
    for command in (["status", "--json"], ["router", "rates", "--json"], ["kvbm", "stats", "--json"]):
        done = subprocess.run(
            [*KVMESH, *command, "--config", str(mesh.file)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)


async def test_callers_without_a_certificate_are_refused(mesh: Mesh, authority: Authority) -> None:
    port, (cert, key, ca) = mesh.config["router"]["port"], authority.read()
    assert await router_says(port, grpc.ssl_channel_credentials(ca, key, cert)) is grpc.StatusCode.OK
    assert await router_says(port, grpc.ssl_channel_credentials(ca)) is grpc.StatusCode.UNAVAILABLE
    assert await router_says(port, None) is grpc.StatusCode.UNAVAILABLE


async def test_callers_of_another_authority_are_refused(
    mesh: Mesh, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path)
    other.issue()
    cert, key, _ = other.read()
    credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes(), key, cert)
    for name, port in grpc_ports(mesh).items():
        assert await router_says(port, credentials) is grpc.StatusCode.UNAVAILABLE, name


async def test_the_bus_asks_for_certificates(mesh: Mesh, authority: Authority) -> None:
    url = f"nats://127.0.0.1:{mesh.config['nats']['port']}"

    async def ignore(_: Exception) -> None: ...

    def connect(context: ssl.SSLContext) -> Any:
        options: Any = {"tls": context, "tls_hostname": NAME, "error_cb": ignore}
        return nats.connect(url, allow_reconnect=False, connect_timeout=5, **options)

    context = ssl.create_default_context(cafile=str(authority.ca))
    with pytest.raises((OSError, nats.errors.Error, asyncio.IncompleteReadError)):
        await connect(context)
    config = authority.config()
    context.load_cert_chain(config["cert"], config["key"])
    client = await connect(context)
    await client.close()


def test_replaced_certificates_are_shown_without_a_restart(mesh: Mesh, authority: Authority) -> None:
    before = {p["name"]: p["pid"] for p in mesh.status()["processes"]}
    ports = grpc_ports(mesh) | {"nats": mesh.config["nats"]["port"]}
    fresh = authority.issue()
    for name, port in ports.items():

        def replaced(name: str = name, port: int = port) -> bool:
            return serial(mesh, authority, name, port) == fresh

        wait_for(replaced, 20, f"{name} to show its new certificate")
    assert mesh.chat("Hello again")["choices"]
    assert {p["name"]: p["pid"] for p in mesh.status()["processes"]} == before
    # Everybody comes back to a bus that starts anew, with what the files hold now.
    mesh.kill("nats")
    wait_for(lambda: mesh.pid("nats") not in (None, before["nats"]), 30, "the bus to be back")
    wait_for(lambda: mesh.status()["router"]["bus_connected"], 30, "the router to be back on it")
    # What starts now meets processes that run with the new one.
    mesh.kill("decode-0")

    def back() -> bool:
        worker = mesh.workers()["decode-0"]
        return worker["state"] == "ready" and worker["routed"] and worker["pid"] != before["decode-0"]

    def answers() -> bool:
        body = {"model": "default", "messages": [{"role": "user", "content": "And again"}], "max_tokens": 2}
        return httpx.post(f"{mesh.url}/v1/chat/completions", json=body, timeout=60).status_code == 200

    wait_for(back, 40, "the worker to be back")
    wait_for(answers, 20, "the frontend to have found it")
