"""Unary calls of the data plane, made by grpc's own clients."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc.aio
import pytest
from prometheus_client import REGISTRY

from fixtures.waiting import eventually
from kvmesh.common import telemetry
from kvmesh.common.config import Config
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.client import Channels
from kvmesh.common.grpc.server import MAX_MESSAGE_BYTES
from kvmesh.common.grpc.streams import Call, CallHandler
from kvmesh.common.lifecycle import RoleServer
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import RouteRequest, RouteResponse
from kvmesh.v1.router_pb2_grpc import (
    RouterServiceServicer,
    RouterServiceStub,
    add_RouterServiceServicer_to_server,
)

SERVICE = "kvmesh.v1.RouterService"
METHOD = f"/{SERVICE}/Route"
HERE, BEHIND = RouteResponse(policy="here"), RouteResponse(policy="behind")
OVERLOADED = KvmeshError(ErrorCode.ERROR_CODE_OVERLOADED, "zu groß: größer", param="n", retry_after_ms=250)
CLIENT = """
import sys, grpc
from kvmesh.v1.router_pb2 import RouteRequest
from kvmesh.v1.router_pb2_grpc import RouterServiceStub
RouterServiceStub(grpc.insecure_channel(sys.argv[1])).Route(RouteRequest(model="wait"), timeout=1.0)
"""


class Answer(CallHandler):
    """Does what its request's model says."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.closed = False
        self.error: KvmeshError | None = None
        self.traceparent = ""

    def on_message(self, message: bytes) -> None:
        self.traceparent = telemetry.current_traceparent()
        what = RouteRequest.FromString(message).model
        if what == "refuse":
            raise OVERLOADED
        if what == "bug":
            raise ZeroDivisionError("secret")
        if what == "large":
            self.call.answer(bytes(MAX_MESSAGE_BYTES + 1))
        elif what != "wait":
            self.answer()

    def answer(self) -> None:
        self.call.answer(HERE.SerializeToString())

    def on_closed(self, error: KvmeshError | None) -> None:
        assert not self.closed
        self.closed, self.error = True, error


class Behind(RouterServiceServicer):
    async def Route(self, request: RouteRequest, context: Any) -> RouteResponse:
        return BEHIND


class Server:
    """A role whose Route is served off the data plane, with the same method of its gRPC server behind."""

    def __init__(self) -> None:
        config = Config()
        config.router.port = config.router.metrics_port = 0
        self.answers: list[Answer] = []
        self.role = RoleServer("router", config, config.router)
        self.role.add_service(SERVICE, add_RouterServiceServicer_to_server, Behind())
        self.role.add_unary(SERVICE, "Route", self._accept)

    def _accept(self, call: Call) -> Answer:
        self.answers.append(Answer(call))
        return self.answers[-1]

    async def answer(self) -> Answer:
        await eventually(lambda: self.answers)
        return self.answers[-1]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.role.start()
    yield server
    await server.role.stop(0)


@pytest.fixture
async def stub(server: Server) -> AsyncIterator[RouterServiceStub]:
    channels = Channels()
    yield RouterServiceStub(channels.get(server.role.address))
    await channels.close()


@pytest.fixture
def plain(server: Server) -> Iterator[RouterServiceStub]:
    """As `stub`, for calls that block."""
    with grpc.insecure_channel(server.role.address) as channel:
        yield RouterServiceStub(channel)


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"kvmesh_router_rpc_{name}", {"method": METHOD, **labels}) or 0.0


async def status(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        await call
    assert isinstance(caught.value, grpc.aio.AioRpcError)
    return caught.value.code()


async def test_both_kinds_of_clients_are_answered(
    server: Server, stub: RouterServiceStub, plain: RouterServiceStub
) -> None:
    assert await stub.Route(RouteRequest()) == HERE
    assert await asyncio.to_thread(plain.Route, RouteRequest(), 10) == HERE
    many = await asyncio.gather(*(stub.Route(RouteRequest()) for _ in range(100)))
    assert many == [HERE] * 100
    await eventually(lambda: all(answer.closed for answer in server.answers))
    assert [answer.error for answer in server.answers] == [None] * 102


async def test_an_error_arrives_whole(
    server: Server, stub: RouterServiceStub, plain: RouterServiceStub
) -> None:
    for call in (
        stub.Route(RouteRequest(model="refuse")),
        asyncio.to_thread(plain.Route, RouteRequest(model="refuse")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            await call
        error = KvmeshError.from_rpc(caught.value, "router")
        assert (error.code, error.message) == (OVERLOADED.code, OVERLOADED.message)
        assert (error.param, error.retry_after_ms) == ("n", 250)
    assert all(answer.closed for answer in server.answers)


async def test_an_unexpected_exception_tells_the_caller_nothing(stub: RouterServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await stub.Route(RouteRequest(model="bug"))
    error = KvmeshError.from_rpc(caught.value, "router")
    assert error.code == ErrorCode.ERROR_CODE_INTERNAL
    assert "secret" not in error.message


async def test_an_answer_may_take_its_time(server: Server, stub: RouterServiceStub) -> None:
    call = stub.Route(RouteRequest(model="wait"))
    answer = await server.answer()
    await asyncio.sleep(0.05)
    answer.answer()
    assert await call == HERE


@pytest.mark.parametrize("how", ["cancelled", "late", "lost"])
async def test_a_caller_that_leaves_is_noticed(server: Server, how: str) -> None:
    channels = Channels()
    stub = RouterServiceStub(channels.get(server.role.address))
    call = stub.Route(RouteRequest(model="wait"), timeout=0.2 if how == "late" else 10)
    waiting = asyncio.ensure_future(call)
    answer = await server.answer()
    if how == "cancelled":
        call.cancel()
    if how == "late":
        assert await status(call) is grpc.StatusCode.DEADLINE_EXCEEDED
    if how == "lost":
        await channels.forget(server.role.address)
    await eventually(lambda: answer.closed)
    assert answer.error is not None
    assert answer.error.code == ErrorCode.ERROR_CODE_CANCELLED
    await asyncio.gather(waiting, return_exceptions=True)
    await channels.close()
    # It is answered all the same, and nobody hears it.
    answer.answer()


async def test_a_deadline_needs_no_caller_that_says_so(server: Server) -> None:
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, server.role.address, stderr=-1
    )
    try:
        answer = await server.answer()
        client.send_signal(signal.SIGSTOP)
        await eventually(lambda: answer.closed, 10)
        assert answer.error is not None
    finally:
        client.kill()
        await client.wait()


async def test_calls_are_counted(server: Server, stub: RouterServiceStub) -> None:
    codes = ("OK", "CANCELLED", "RESOURCE_EXHAUSTED", "INTERNAL")
    before = {code: counted("requests_total", code=code) for code in codes}
    timed = counted("duration_seconds_count")
    for model in ("", "refuse", "bug"):
        await asyncio.gather(stub.Route(RouteRequest(model=model)), return_exceptions=True)
    call = stub.Route(RouteRequest(model="wait"))
    await eventually(lambda: len(server.answers) == 4)
    assert counted("in_flight") == 1
    call.cancel()
    await eventually(lambda: server.answers[-1].closed)
    assert {code: counted("requests_total", code=code) for code in codes} == {
        code: count + 1 for code, count in before.items()
    }
    assert counted("in_flight") == 0
    assert counted("duration_seconds_count") == timed + 4


async def test_the_callers_trace_continues(server: Server, stub: RouterServiceStub) -> None:
    with telemetry.span("request"):
        mine = telemetry.current_traceparent()
        await stub.Route(RouteRequest())
    theirs = server.answers[0].traceparent
    assert theirs.split("-")[1] == mine.split("-")[1]
    assert theirs != mine
    # One without is a trace of its own.
    await stub.Route(RouteRequest())
    assert server.answers[1].traceparent.split("-")[1] != mine.split("-")[1]


async def test_what_is_too_large_is_refused_either_way(server: Server) -> None:
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(server.role.address, unlimited) as channel:
        stub = RouterServiceStub(channel)
        request = RouteRequest(request_id="x" * MAX_MESSAGE_BYTES)
        assert await status(stub.Route(request)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not server.answers
        assert await status(stub.Route(RouteRequest(model="large"))) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await stub.Route(RouteRequest()) == HERE


async def test_compressed_calls_are_the_other_servers(server: Server, stub: RouterServiceStub) -> None:
    request = RouteRequest(request_id="x" * 1000)
    assert await stub.Route(request, compression=grpc.Compression.Gzip) == BEHIND
    assert await stub.Route(request) == HERE


async def test_a_stop_waits_for_calls_and_takes_no_more(server: Server, stub: RouterServiceStub) -> None:
    waiting = asyncio.ensure_future(stub.Route(RouteRequest(model="wait")))
    answer = await server.answer()
    stopping = asyncio.create_task(server.role.stop(10))
    await asyncio.sleep(0.05)
    with pytest.raises(grpc.RpcError) as caught:
        await stub.Route(RouteRequest())
    assert KvmeshError.from_rpc(caught.value, "router").message.endswith("shutting down; use another one")
    assert not stopping.done()
    answer.answer()
    assert await waiting == HERE
    await asyncio.wait_for(stopping, 5)


async def test_a_stop_cuts_what_outlasts_it(server: Server, stub: RouterServiceStub) -> None:
    waiting = asyncio.ensure_future(status(stub.Route(RouteRequest(model="wait"))))
    answer = await server.answer()
    began = time.monotonic()
    await server.role.stop(0.1)
    assert time.monotonic() - began < 3
    assert await waiting in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert answer.error is not None
