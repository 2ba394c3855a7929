"""The data plane's streams: between two hubs, and with grpc's own library at either end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from prometheus_client import REGISTRY

from fixtures.waiting import eventually
from kvmesh.common import metrics
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.server import ServerInterceptor
from kvmesh.common.grpc.streams import Stream, StreamHub
from kvmesh.common.grpc.trailers import STATUS_METADATA_KEY, rich_status
from kvmesh.v1.engine_pb2 import CancelRequest, GenerateRequest, GenerateResponse, GetWorkerRequest
from kvmesh.v1.engine_pb2_grpc import (
    DecodeServiceServicer,
    DecodeServiceStub,
    WorkerServiceStub,
    add_DecodeServiceServicer_to_server,
)
from kvmesh.v1.errors_pb2 import ErrorCode

METHOD = "/kvmesh.v1.DecodeService/Generate"


class Log:
    """A handler that writes down what it hears; `answer` is raised or sent on every message."""

    def __init__(self, stream: Stream | None = None, answer: bytes | Exception | None = None) -> None:
        self.stream = stream
        self.answer = answer
        self.messages: list[bytes] = []
        self.half_closed = self.writable = self.closed = False
        self.error: KvmeshError | None = None

    def on_message(self, message: bytes) -> None:
        self.messages.append(message)
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is not None:
            assert self.stream is not None
            self.stream.send(self.answer)

    def on_half_close(self) -> None:
        self.half_closed = True

    def on_writable(self) -> None:
        self.writable = True

    def on_closed(self, error: KvmeshError | None) -> None:
        assert not self.closed
        self.closed, self.error = True, error


class Server:
    """A hub that serves METHOD, every stream with a `Log`."""

    def __init__(self, answer: bytes | Exception | None = None) -> None:
        self.hub = StreamHub(metrics.rpc("decode"))
        self.logs: list[Log] = []
        self.answer = answer
        self.refusal: KvmeshError | None = None
        self.port = self.hub.serve("127.0.0.1", 0, {METHOD: self.accept}, "/nowhere")
        self.address = f"127.0.0.1:{self.port}"

    def accept(self, stream: Stream) -> Log:
        if self.refusal is not None:
            raise self.refusal
        self.logs.append(Log(stream, self.answer))
        return self.logs[-1]

    async def log(self) -> Log:
        await eventually(lambda: self.logs)
        return self.logs[-1]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    yield server
    server.hub.close()


@pytest.fixture
async def hub() -> AsyncIterator[StreamHub]:
    hub = StreamHub()
    yield hub
    hub.close()


async def test_messages_and_an_orderly_end(server: Server, hub: StreamHub) -> None:
    server.answer = b"answer"
    mine = Log()
    stream = hub.open(server.address, METHOD, mine)
    assert stream.send(b"one")
    assert stream.send(b"")
    await eventually(lambda: len(mine.messages) == 2)
    theirs = await server.log()
    assert (theirs.messages, mine.messages) == ([b"one", b""], [b"answer", b"answer"])
    stream.end()
    await eventually(lambda: theirs.half_closed)
    assert not theirs.closed
    assert theirs.stream is not None
    theirs.stream.end()
    await eventually(lambda: theirs.closed and mine.closed)
    assert (theirs.error, mine.error) == (None, None)
    assert await hub.drained(1)
    assert await server.hub.drained(1)


@pytest.mark.parametrize("how", ["refused", "raised"])
async def test_errors_cross_the_stream_whole(server: Server, hub: StreamHub, how: str) -> None:
    error = KvmeshError(ErrorCode.ERROR_CODE_OVERLOADED, "too many", param="n", retry_after_ms=250)
    server.refusal, server.answer = (error, None) if how == "refused" else (None, error)
    mine = Log()
    hub.open(server.address, METHOD, mine).send(b"x")
    await eventually(lambda: mine.closed)
    assert mine.error is not None
    assert (mine.error.code, mine.error.message) == (error.code, "too many")
    assert (mine.error.param, mine.error.retry_after_ms) == ("n", 250)


async def test_a_broken_handler_is_an_internal_error_of_its_stream_alone(
    server: Server, hub: StreamHub
) -> None:
    server.answer = ValueError("secret")
    mine = Log()
    hub.open(server.address, METHOD, mine).send(b"x")
    await eventually(lambda: mine.closed)
    assert mine.error is not None
    assert mine.error.code == ErrorCode.ERROR_CODE_INTERNAL
    assert "secret" not in mine.error.message
    server.answer = b"fine"
    other = Log()
    hub.open(server.address, METHOD, other).send(b"x")
    await eventually(lambda: other.messages)


async def test_leaving_is_noticed_at_the_other_end(server: Server, hub: StreamHub) -> None:
    mine = Log()
    stream = hub.open(server.address, METHOD, mine)
    theirs = await server.log()
    stream.cancel()
    await eventually(lambda: theirs.closed)
    assert theirs.error is not None
    assert theirs.error.code == ErrorCode.ERROR_CODE_CANCELLED
    assert not mine.closed
    again = Log()
    hub.open(server.address, METHOD, again)
    await eventually(lambda: len(server.logs) == 2)
    server.hub.close()
    assert server.logs[1].closed
    await eventually(lambda: again.closed)
    assert again.error is not None
    assert again.error.code == ErrorCode.ERROR_CODE_UNAVAILABLE


async def test_nobody_there(hub: StreamHub) -> None:
    mine = Log()
    stream = hub.open("127.0.0.1:1", METHOD, mine)
    stream.send(b"x")
    await eventually(lambda: mine.closed)
    assert mine.error is not None
    assert mine.error.code == ErrorCode.ERROR_CODE_UNAVAILABLE
    stream.send(b"late")
    stream.end()


async def test_streams_are_counted(server: Server, hub: StreamHub) -> None:
    def counted(name: str, **labels: str) -> float:
        labels["method"] = METHOD
        return REGISTRY.get_sample_value(f"kvmesh_decode_rpc_{name}", labels) or 0.0

    ended = counted("requests_total", code="OK")
    stream = hub.open(server.address, METHOD, Log())
    theirs = await server.log()
    assert counted("in_flight") == 1
    stream.end()
    assert theirs.stream is not None
    theirs.stream.end()
    await eventually(lambda: theirs.closed)
    assert counted("in_flight") == 0
    assert counted("requests_total", code="OK") == ended + 1

    refused = counted("requests_total", code="RESOURCE_EXHAUSTED")
    hub.open(server.address, METHOD, Log())
    await eventually(lambda: len(server.logs) == 2)
    theirs = server.logs[-1]
    assert theirs.stream is not None
    theirs.stream.fail(KvmeshError(ErrorCode.ERROR_CODE_OVERLOADED, "too slow"))
    assert theirs.closed
    assert counted("requests_total", code="RESOURCE_EXHAUSTED") == refused + 1
    assert counted("in_flight") == 0
    assert counted("requests_total", code="OK") == ended + 1


async def test_a_grpc_client_is_served(server: Server) -> None:
    server.answer = GenerateResponse().SerializeToString()
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = DecodeServiceStub(channel).Generate()
        await call.write(GenerateRequest(cancel=CancelRequest(id=7)))
        assert await call.read() == GenerateResponse()
        theirs = await server.log()
        assert GenerateRequest.FromString(theirs.messages[0]).cancel.id == 7
        error = KvmeshError(ErrorCode.ERROR_CODE_WORKER_LOST, "gone")
        assert theirs.stream is not None
        theirs.stream.fail(error)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert KvmeshError.from_rpc(caught.value, "worker").code == error.code
        trailers = [(str(key), value) for key, value in caught.value.trailing_metadata()]
        assert (STATUS_METADATA_KEY, rich_status(error).SerializeToString()) in trailers
        # Whatever else is asked for belongs to the server behind, which is not there.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await WorkerServiceStub(channel).GetWorker(GetWorkerRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_grpc_server_is_understood(hub: StreamHub, tmp_path: Path) -> None:
    class Servicer(DecodeServiceServicer):
        async def Generate(self, request_iterator: Any, context: Any) -> AsyncIterator[GenerateResponse]:
            async for _ in request_iterator:
                yield GenerateResponse()
            raise KvmeshError(ErrorCode.ERROR_CODE_DATA_CORRUPTED, "bad block")

    server = grpc.aio.server(interceptors=[ServerInterceptor("decode")])
    add_DecodeServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        mine = Log()
        stream = hub.open(f"127.0.0.1:{port}", METHOD, mine)
        stream.send(GenerateRequest().SerializeToString())
        await eventually(lambda: mine.messages == [b""])
        stream.end()
        await eventually(lambda: mine.closed)
        assert mine.error is not None
        assert (mine.error.code, mine.error.message) == (ErrorCode.ERROR_CODE_DATA_CORRUPTED, "bad block")
    finally:
        await server.stop(None)


async def test_a_reader_that_is_behind_is_told_of(server: Server, hub: StreamHub) -> None:
    mine = Log()
    hub.open(server.address, METHOD, mine)
    theirs = await server.log()
    assert theirs.stream is not None
    sent = 0
    # No look at the loop in between: nothing is read here meanwhile.
    while theirs.stream.send(bytes(1 << 20)):
        sent += 1
        assert sent < 1000
    await eventually(lambda: theirs.writable and len(mine.messages) == sent + 1)
    await asyncio.sleep(0)
    assert not mine.closed


async def test_handlers_that_break_while_opening_and_closing_hurt_no_other(
    server: Server, hub: StreamHub
) -> None:
    class Broken(Log):
        def on_closed(self, error: KvmeshError | None) -> None:
            super().on_closed(error)
            raise ValueError("closing")

    accept, made = server.accept, 0

    def broken_first(stream: Stream) -> Log:
        nonlocal made
        made += 1
        if made == 1:
            raise ValueError("opening")
        if made == 2:
            return Broken(stream, ValueError("message"))
        return accept(stream)

    server.hub._accept[METHOD] = broken_first  # pyright: ignore[reportPrivateUsage]
    server.answer = b"fine"
    first, second, third = Log(), Broken(), Log()
    hub.open(server.address, METHOD, first)
    await eventually(lambda: first.closed)
    hub.open(server.address, METHOD, second).send(b"x")
    await eventually(lambda: second.closed)
    assert {first.error.code, second.error.code} == {ErrorCode.ERROR_CODE_INTERNAL}  # pyright: ignore
    hub.open(server.address, METHOD, third).send(b"x")
    await eventually(lambda: third.messages == [b"fine"])
