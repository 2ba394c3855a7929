"""The endpoint's listener, on the loop that services run on."""

from __future__ import annotations

import asyncio
import socket

import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from fixtures.ports import free_port
from kvmesh.common.config import FrontendConfig
from kvmesh.frontend.http.server import HttpServer

BURST = 256
REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


def test_the_last_of_a_burst_of_connections_is_served_when_the_first_are() -> None:
    """As many connections as come while a turn of the loop is under way: those behind must not wait while
    the ones before them ask again and again."""

    async def rounds() -> int:
        loop = asyncio.get_running_loop()
        first = asyncio.Event()
        served = set[int]()
        answered = 0

        async def answer(request: Request) -> PlainTextResponse:
            nonlocal answered
            answered += 1
            served.add(request.scope["client"][1])
            first.set()
            return PlainTextResponse("ok")

        port = free_port()
        server = HttpServer(Starlette(routes=[Route("/", answer)]), FrontendConfig(http_port=port))
        await server.start()
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(BURST)]

        async def ask_again(connection: socket.socket) -> None:
            connection.setblocking(False)
            while len(served) < BURST:
                await loop.sock_sendall(connection, REQUEST)
                assert (await loop.sock_recv(connection, 4096)).startswith(b"HTTP/1.1 200")

        await asyncio.gather(*map(ask_again, connections))
        for connection in connections:
            connection.close()
        await server.stop(1.0)
        return answered // BURST

    # One by one it takes 256 turns of the loop, in which the first are served about as often.
    assert uvloop.run(rounds()) < 16
