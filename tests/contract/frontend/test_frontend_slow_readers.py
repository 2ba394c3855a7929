"""Clients that stop reading and stay connected: they cost a bounded time and bounded memory."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import orjson
import pytest

from fixtures.frontend import MODEL, Split, frontend, hello, make
from fixtures.scripted_worker import ROLE_DECODE, ROLE_PREFILL
from fixtures.waiting import eventually
from kvmesh.v1.engine_pb2 import SamplingParams
from kvmesh.v1.frontend_pb2 import ChatMessage, ChatRequest
from kvmesh.v1.frontend_pb2_grpc import FrontendServiceStub

CLIENTS = 3
# Of an answer in chunks.
END = b"0\r\n\r\n"
TOKENS = 1_000
# Answers that are more than the sockets and 16 KiB take.
STREAMS = {
    "/v1/chat/completions": hello(stream=True),
    "/v1/messages": hello(stream=True, max_tokens=TOKENS),
    "/v1/responses": {"model": MODEL, "input": "hello", "stream": True},
}


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Split]:
    async with frontend(**settings) as front:
        prefill, decode = (
            make(role, [260 + i % 7 for i in range(TOKENS)], context_length=2 * TOKENS)
            for role in (ROLE_PREFILL, ROLE_DECODE)
        )
        await front.join(prefill, decode)
        for listener in server(front.http_server).servers:
            for one in listener.sockets:
                # What the kernel takes by itself is megabytes by default; connections have their listener's.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield Split(front, prefill, decode)
        await prefill.kill()
        await decode.kill()


def server(of: Any) -> Any:
    return of._server


class Deaf:
    """A connection whose client reads only when told to."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.setblocking(False)

    async def ask(self, split: Split, path: str, body: dict[str, Any]) -> Deaf:
        host, port = split.front.url.removeprefix("http://").split(":")
        content = orjson.dumps(body)
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, (host, int(port)))
        await loop.sock_sendall(self._socket, head.encode() + content)
        return self

    async def read(self, size: int) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self._socket, size)

    async def rest(self) -> bytes:
        """What comes until the server closes; not to be used afterwards."""
        parts = [b""]
        with self._socket:
            async with asyncio.timeout(5):
                while part := await self.read(1 << 16):
                    parts.append(part)
        return b"".join(parts)


def connections(split: Split) -> list[Any]:
    return list(server(split.front.http_server).server_state.connections)


def untaken(split: Split) -> list[int]:
    """Bytes that wait for their client, of each connection."""
    return [connection.transport.get_write_buffer_size() for connection in connections(split)]


def behind(split: Split) -> int:
    return sum(connection.flow.write_paused for connection in connections(split))


@pytest.mark.parametrize("path", STREAMS)
async def test_a_client_that_stops_reading_is_cut_off_at_the_deadline(path: str) -> None:
    async with serving(request_timeout_s=3.0) as split:
        clients = [await Deaf().ask(split, path, STREAMS[path]) for _ in range(CLIENTS)]
        await eventually(lambda: behind(split) == CLIENTS, 5, "all clients to be behind")
        # The engines are done, and yet no more than this waits.
        await eventually(lambda: not split.decode.live, 5)
        assert max(untaken(split)) < 18 << 10
        assert split.front.mesh.sessions
        await eventually(lambda: split.front.idle(split.prefill, split.decode), 5)
        for client in clients:
            assert not (await client.rest()).endswith(END)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(stream: bool) -> None:
    """While more is to come as well as when all has been written."""
    async with serving(write_timeout_s=0.5) as split:
        body = hello(stream=stream, logprobs=True, top_logprobs=20, max_tokens=100)
        client = await Deaf().ask(split, "/v1/chat/completions", body)
        await eventually(lambda: any(untaken(split)), 5, "something to be left to take")
        await eventually(lambda: not connections(split), 5, "the connection to be cut off")
        await split.idle()
        assert not (await client.rest()).endswith(END if stream else b"}")


async def test_a_client_that_reads_slowly_has_its_time() -> None:
    async with serving(write_timeout_s=0.5) as split:
        client = await Deaf().ask(split, "/v1/chat/completions", hello(stream=True, max_tokens=600))
        await eventually(lambda: behind(split) == 1, 5)
        answer = b""
        async with asyncio.timeout(30):
            while not answer.endswith(END):
                await asyncio.sleep(0.05)
                answer += await client.read(4096)
        assert b"data: [DONE]" in answer
        await split.idle()
        await split.front.http_server.stop(1.0)
        assert await client.rest() == b""


async def test_a_grpc_client_that_stops_reading_is_given_up_at_the_deadline() -> None:
    async with serving(request_timeout_s=1.5) as split:
        request = ChatRequest(
            messages=[ChatMessage(role="user", content="hello")],
            sampling=SamplingParams(max_new_tokens=TOKENS, top_logprobs=20),
        )
        # Its window stays at 64 KiB.
        options = [("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(split.front.grpc_address, options=options) as channel:
            call = FrontendServiceStub(channel).Chat(request)
            await eventually(lambda: split.decode.received and not split.decode.live, 5)
            await eventually(lambda: split.front.idle(split.prefill, split.decode), 5)
            with pytest.raises(grpc.aio.AioRpcError) as broken:
                async for _ in call:
                    pass
            assert broken.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
