"""The server's interceptor and the client's channels, over real connections."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY

from fixtures.waiting import eventually
from kvmesh.common import telemetry
from kvmesh.common.config import Config
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.grpc.client import Channels
from kvmesh.common.lifecycle import RoleServer
from kvmesh.v1.engine_pb2 import GenerateRequest, GenerateResponse, RequestStep
from kvmesh.v1.engine_pb2_grpc import (
    DecodeServiceServicer,
    DecodeServiceStub,
    add_DecodeServiceServicer_to_server,
)
from kvmesh.v1.events_pb2 import SnapshotRequest, SnapshotResponse
from kvmesh.v1.events_pb2_grpc import (
    EventServiceServicer,
    EventServiceStub,
    add_EventServiceServicer_to_server,
)

# Not in the published stubs.
EOF: Any = getattr(grpc.aio, "EOF")  # noqa: B009


class Streams(DecodeServiceServicer, EventServiceServicer):
    """A generator handler and a handler that writes; both remember how they ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.traceparents: list[str] = []
        self.snapshot = ""

    async def Generate(
        self, request_iterator: AsyncIterator[GenerateRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[GenerateResponse]:
        self.traceparents.append(telemetry.current_traceparent())
        try:
            async for request in request_iterator:
                if request.start.id == 99:
                    raise invalid("no such thing", "id")
                while request.start.id == 7:
                    yield GenerateResponse(steps=[RequestStep(token_ids=range(1 << 20))])
                yield GenerateResponse(steps=[RequestStep(id=request.start.id)])
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        except GeneratorExit:
            self.ended.append("closed")
            raise
        else:
            self.ended.append("done")

    async def Snapshot(self, request: SnapshotRequest, context: grpc.aio.ServicerContext) -> None:
        try:
            if request.holder_id == "write":
                await context.write(SnapshotResponse())
                return
            if request.holder_id == "refuse":
                raise invalid("no such holder", "holder_id")
            if request.holder_id == "bug":
                raise ZeroDivisionError
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise


@pytest.fixture
async def server() -> AsyncIterator[tuple[RoleServer, Streams, Channels]]:
    config = Config()
    config.worker.port = config.worker.metrics_port = 0
    role_server = RoleServer("decode", config, config.worker)
    streams = Streams()
    role_server.add_service("kvmesh.v1.DecodeService", add_DecodeServiceServicer_to_server, streams)
    role_server.add_service("kvmesh.v1.EventService", add_EventServiceServicer_to_server, streams)
    await role_server.start()
    channels = Channels()
    yield role_server, streams, channels
    await channels.close()
    await role_server.stop(0)


def start(number: int) -> GenerateRequest:
    request = GenerateRequest()
    request.start.id = number
    return request


async def test_headers_come_before_the_first_message(server: tuple[RoleServer, Streams, Channels]) -> None:
    role_server, _, channels = server
    call = DecodeServiceStub(channels.get(role_server.address)).Generate()
    async with asyncio.timeout(2):
        await call.initial_metadata()
    call.cancel()


async def test_a_stream_echoes_and_ends(server: tuple[RoleServer, Streams, Channels]) -> None:
    role_server, streams, channels = server
    call = DecodeServiceStub(channels.get(role_server.address)).Generate()
    for number in (1, 2, 3):
        await call.write(start(number))
        response = await call.read()
        assert isinstance(response, GenerateResponse)
        assert response.steps[0].id == number
    await call.done_writing()
    assert await call.read() is EOF
    await eventually(lambda: streams.ended == ["done"])


async def test_handlers_that_write_work_too(server: tuple[RoleServer, Streams, Channels]) -> None:
    role_server, _, channels = server
    call = EventServiceStub(channels.get(role_server.address)).Snapshot(SnapshotRequest(holder_id="write"))
    assert len([response async for response in call]) == 1


async def test_an_error_in_mid_stream_arrives_whole(server: tuple[RoleServer, Streams, Channels]) -> None:
    role_server, _, channels = server
    call = DecodeServiceStub(channels.get(role_server.address)).Generate()
    await call.write(start(1))
    await call.read()
    await call.write(start(99))
    with pytest.raises(grpc.RpcError) as caught:
        await call.read()
    error = KvmeshError.from_rpc(caught.value, "decode-0")
    assert (error.message, error.param) == ("no such thing", "id")


async def test_cancel_reaches_a_handler_that_waits(server: tuple[RoleServer, Streams, Channels]) -> None:
    role_server, streams, channels = server
    call = EventServiceStub(channels.get(role_server.address)).Snapshot(SnapshotRequest())
    await call.initial_metadata()
    call.cancel()
    await eventually(lambda: streams.ended == ["cancelled"])


async def test_cancel_ends_the_requests_of_a_handler_that_reads(
    server: tuple[RoleServer, Streams, Channels],
) -> None:
    role_server, streams, channels = server
    call = DecodeServiceStub(channels.get(role_server.address)).Generate()
    await call.write(start(1))
    await call.read()
    call.cancel()
    await eventually(lambda: bool(streams.ended))


async def test_cancel_while_sending_closes_the_generator(
    server: tuple[RoleServer, Streams, Channels],
) -> None:
    role_server, streams, channels = server
    call = DecodeServiceStub(channels.get(role_server.address)).Generate()
    await call.write(start(7))
    await call.read()
    # Nobody reads on: the handler is stuck in a send when the caller leaves.
    await asyncio.sleep(0.3)
    call.cancel()
    await eventually(lambda: bool(streams.ended))


async def test_a_deadline_ends_the_handler(server: tuple[RoleServer, Streams, Channels]) -> None:
    role_server, streams, channels = server
    call = EventServiceStub(channels.get(role_server.address)).Snapshot(SnapshotRequest(), timeout=0.2)
    with pytest.raises(grpc.RpcError) as caught:
        _ = [response async for response in call]
    assert isinstance(caught.value, grpc.aio.AioRpcError)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: streams.ended == ["cancelled"])


async def test_a_lost_connection_cancels_the_handler(server: tuple[RoleServer, Streams, Channels]) -> None:
    role_server, streams, channels = server
    call = EventServiceStub(channels.get(role_server.address)).Snapshot(SnapshotRequest())
    await call.initial_metadata()
    await channels.forget(role_server.address)
    await eventually(lambda: streams.ended == ["cancelled"])


async def test_the_callers_trace_continues(server: tuple[RoleServer, Streams, Channels]) -> None:
    role_server, streams, channels = server
    with telemetry.span("request"):
        mine = telemetry.current_traceparent()
        call = DecodeServiceStub(channels.get(role_server.address)).Generate()
        await call.done_writing()
        assert await call.read() is EOF
    (theirs,) = streams.traceparents
    assert theirs.split("-")[1] == mine.split("-")[1]
    assert theirs != mine


async def test_rpcs_are_counted(server: tuple[RoleServer, Streams, Channels]) -> None:
    role_server, _, channels = server
    stub = EventServiceStub(channels.get(role_server.address))
    method = "/kvmesh.v1.EventService/Snapshot"

    def count(code: str) -> float:
        labels = {"method": method, "code": code}
        return REGISTRY.get_sample_value("kvmesh_decode_rpc_requests_total", labels) or 0.0

    before = {code: count(code) for code in ("OK", "CANCELLED", "INVALID_ARGUMENT", "INTERNAL")}
    for holder in ("write", "refuse", "bug", "wait"):
        call = stub.Snapshot(SnapshotRequest(holder_id=holder))
        await call.initial_metadata()
        if holder == "wait":
            call.cancel()
            continue
        with contextlib.suppress(grpc.RpcError):
            _ = [response async for response in call]
    await eventually(lambda: all(count(code) == before[code] + 1 for code in before))
    assert REGISTRY.get_sample_value("kvmesh_decode_rpc_in_flight", {"method": method}) == 0


async def test_health_names_each_service(server: tuple[RoleServer, Streams, Channels]) -> None:
    role_server, _, channels = server
    # The published stubs know the synchronous API only.
    health: Any = health_pb2_grpc.HealthStub(channels.get(role_server.address))

    async def status(service: str) -> str:
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    assert await status("") == "SERVING"
    assert await status("kvmesh.v1.DecodeService") == "NOT_SERVING"
    role_server.set_ready(True)
    await asyncio.sleep(0.05)
    assert await status("kvmesh.v1.DecodeService") == "SERVING"
    assert await status("kvmesh.v1.EventService") == "SERVING"
    role_server.set_ready(False)
    await asyncio.sleep(0.05)
    assert await status("kvmesh.v1.DecodeService") == "NOT_SERVING"


async def test_one_channel_an_address() -> None:
    channels = Channels()
    assert channels.get("127.0.0.1:1") is channels.get("127.0.0.1:1")
    assert channels.get("127.0.0.1:1") is not channels.get("127.0.0.1:2")
    await channels.close()
