"""Certificates of the mesh: on streams in Rust and on grpc's own servers, replaced while they serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fixtures.certificates import NAME, Authority
from fixtures.waiting import eventually
from kvmesh.common.config import Config, load_config
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.client import Channels
from kvmesh.common.grpc.streams import Call, CallHandler, Stream, StreamHub
from kvmesh.common.lifecycle import RoleServer
from kvmesh.common.tls import MeshTls
from kvmesh.v1.errors_pb2 import ErrorCode

METHOD = "/test.Service/Talk"


class Echo:
    """Sends back what comes, and remembers it."""

    def __init__(self, stream: Stream | None = None) -> None:
        self.stream = stream
        self.received: list[bytes] = []
        self.closed = False
        self.error: KvmeshError | None = None

    def on_message(self, message: bytes) -> None:
        self.received.append(message)
        if self.stream is not None:
            self.stream.send(message)

    def on_half_close(self) -> None:
        if self.stream is not None:
            self.stream.end()

    def on_writable(self) -> None: ...

    def on_closed(self, error: KvmeshError | None) -> None:
        self.closed, self.error = True, error


class Repeat(CallHandler):
    """Answers with what it was asked."""

    def __init__(self, call: Call) -> None:
        self.on_message = call.answer


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    authority = Authority(tmp_path / "authority")
    authority.issue()
    return authority


def config_of(section: dict[str, Any]) -> Config:
    return load_config(None, {"tls": section})


def tls_of(section: dict[str, Any]) -> MeshTls:
    tls = MeshTls.of(config_of(section).tls)
    assert tls is not None
    return tls


async def say(port: int, tls: MeshTls | None) -> Echo:
    """One message over a stream of its own, and what came of it."""
    hub, echo = StreamHub(tls=tls), Echo()
    try:
        stream = hub.open(f"127.0.0.1:{port}", METHOD, echo)
        stream.send(b"hello")
        stream.end()
        await eventually(lambda: echo.closed, 10, "the stream to end")
        return echo
    finally:
        hub.close()


async def check(port: int, tls: MeshTls | None) -> grpc.StatusCode:
    """A health check over a channel of its own."""
    channels = Channels(tls)
    stub: Any = health_pb2_grpc.HealthStub(channels.get(f"127.0.0.1:{port}"))
    try:
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code()
    finally:
        await channels.close()
    return grpc.StatusCode.OK


Served = Callable[[dict[str, Any]], Awaitable[int]]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """Starts a role that serves a stream, and gives its port."""
    servers: list[RoleServer] = []

    async def start(section: dict[str, Any]) -> int:
        config = config_of(section)
        server = RoleServer("decode", config, config.worker)
        server.add_stream("test.Service", "Talk", lambda stream: Echo(stream))
        server.add_unary("test.Service", "Ask", Repeat)
        await server.start()
        servers.append(server)
        return server.port

    yield start
    for server in servers:
        await server.stop(1.0)


@pytest.mark.parametrize("name", ["", NAME])
async def test_streams_and_calls_share_a_port_and_its_certificate(
    served: Served, authority: Authority, name: str
) -> None:
    section = authority.config(server_name=name)
    port, tls = await served(section), tls_of(section)
    echo = await say(port, tls)
    assert (echo.received, echo.error) == ([b"hello"], None)
    assert await check(port, tls) is grpc.StatusCode.OK
    channels = Channels(tls)
    ask: Any = channels.get(f"127.0.0.1:{port}").unary_unary("/test.Service/Ask")
    assert await ask(b"hello") == b"hello"
    await channels.close()


async def test_strangers_are_refused(served: Served, authority: Authority, tmp_path: Path) -> None:
    port = await served(authority.config())
    other = Authority(tmp_path / "other")
    other.issue()
    # One that trusts the mesh, and that the mesh does not.
    stranger = tls_of({**other.config(), "ca": str(authority.ca)})
    for tls in (None, stranger, tls_of(other.config())):
        echo = await say(port, tls)
        assert not echo.received
        assert echo.error is not None
        assert echo.error.code == ErrorCode.ERROR_CODE_UNAVAILABLE
        assert await check(port, tls) is grpc.StatusCode.UNAVAILABLE


async def test_callers_need_no_certificate_where_none_is_asked_for(
    served: Served, authority: Authority, tmp_path: Path
) -> None:
    port = await served(authority.config(client_auth="none"))
    other = Authority(tmp_path / "other")
    other.issue()
    stranger = tls_of({**other.config(), "ca": str(authority.ca)})
    assert (await say(port, stranger)).received == [b"hello"]
    assert await check(port, stranger) is grpc.StatusCode.OK


async def test_a_whole_new_authority_takes_over_without_a_restart(
    served: Served, authority: Authority, tmp_path: Path
) -> None:
    port, before = await served(authority.config()), tls_of(authority.config())
    assert (await say(port, before)).received
    other = Authority(tmp_path / "other")
    other.issue()
    for file in ("ca.pem", "peer.key", "peer.pem"):
        (other.directory / file).replace(authority.directory / file)
    after = tls_of(authority.config())

    async def both() -> bool:
        said, called = await asyncio.gather(say(port, after), check(port, after))
        return bool(said.received) and called is grpc.StatusCode.OK

    for _ in range(200):
        if await both():
            break
        await asyncio.sleep(0.1)
    else:
        pytest.fail("the new certificates were not taken")
    # A client that was there before takes it over, too.
    assert (await say(port, before)).received
    assert await check(port, before) is grpc.StatusCode.OK


async def test_a_replacement_that_does_not_fit_is_not_taken(served: Served, authority: Authority) -> None:
    port, tls = await served(authority.config()), tls_of(authority.config())
    for file in ("peer.pem", "ca.pem"):
        (authority.directory / file).write_text("no certificate")
        tls.refresh()
    assert tls.version == 0
    assert (await say(port, tls)).received
    assert await check(port, tls) is grpc.StatusCode.OK


def test_files_that_cannot_be_used_are_named(authority: Authority) -> None:
    with pytest.raises(KvmeshError, match=r"peer\.pem.*see `tls` in the configuration"):
        tls_of({**authority.config(), "key": str(authority.ca)})
    with pytest.raises(KvmeshError, match="no such file"):
        tls_of({**authority.config(), "ca": "/nowhere"})
    with pytest.raises(KvmeshError, match="needs all of `cert`, `key` and `ca`"):
        load_config(None, {"tls": {"cert": "x"}})
