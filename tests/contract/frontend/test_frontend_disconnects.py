"""Clients that leave: everything of theirs ends at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import httpx
import orjson
import psutil
import pytest

from fixtures.frontend import (
    EOS,
    Split,
    endless,
    hello,
)
from fixtures.waiting import eventually


async def leave(split: Split, *, stream: bool, when: Callable[[], bool]) -> None:
    """Send a request and close the connection once `when()` holds."""
    async with httpx.AsyncClient(base_url=split.front.url) as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=hello(stream=stream)))
        await eventually(when, timeout=5)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_the_first_token(split: Split, stream: bool) -> None:
    split.prefill.stall.clear()
    split.decode.stall.clear()
    await leave(split, stream=stream, when=lambda: bool(split.decode.live and split.prefill.live))
    await split.idle()
    assert split.prefill.cancelled
    assert split.decode.cancelled


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_in_mid_stream(split: Split, stream: bool) -> None:
    split.decode.script = endless
    split.decode.step_s = 0.005

    def some_tokens() -> bool:
        return any(session.output_tokens > 3 for session in split.front.mesh.sessions)

    await leave(split, stream=stream, when=some_tokens)
    await split.idle()
    assert split.decode.cancelled


async def test_leaving_after_a_large_body(split: Split) -> None:
    """However its parts came: the server stops reading while much of one is not taken."""
    split.prefill.stall.clear()
    split.decode.stall.clear()
    body = orjson.dumps(hello(unknown="a" * 400_000))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    host, port = split.front.url.removeprefix("http://").split(":")
    for number in range(8):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(head)
        await asyncio.sleep(0.02 * (number % 2))
        writer.write(body)
        await writer.drain()
        await eventually(lambda: bool(split.decode.live and split.prefill.live))
        writer.close()
        await split.idle()


async def test_leaving_while_being_placed(split: Split) -> None:
    """A lease that is granted after the client has gone is given back."""
    router = split.front.router
    router.gate.clear()
    await leave(split, stream=True, when=lambda: bool(router.requests))
    await eventually(lambda: not split.front.mesh.sessions)
    await eventually(lambda: len(router.cancels) == 1, what="the request to be taken back")
    router.gate.set()
    await eventually(lambda: router.reports, timeout=2)
    assert router.reports[-1].ended
    await split.idle()
    assert not split.decode.received


@pytest.mark.timeout(300)
async def test_random_disconnects_leak_nothing(split: Split) -> None:
    split.decode.script = endless
    split.decode.step_s = 0.01
    rng = random.Random(3)
    host, port = split.front.url.removeprefix("http://").split(":")
    limit = asyncio.Semaphore(30)
    process = psutil.Process()

    async def leave_at_random() -> None:
        body = orjson.dumps(hello(stream=rng.random() < 0.5))
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        async with limit:
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(head + body)
            await asyncio.sleep(rng.random() * 0.2)
            writer.transport.abort()

    async def held() -> tuple[int, int]:
        """Tasks and file descriptors, once nothing of any request is left."""
        await eventually(lambda: split.front.idle(split.prefill, split.decode), 20)
        server: Any = split.front.http_server._server
        await eventually(lambda: not server.server_state.connections, 20)
        return len(asyncio.all_tasks()), process.num_fds()

    # So that what is made once is there.
    await asyncio.gather(*(leave_at_random() for _ in range(100)))
    before, memory = await held(), process.memory_info().rss
    await asyncio.gather(*(leave_at_random() for _ in range(10_000)))
    tasks, descriptors = await held()
    # A machine that stalls may have had the way to the router made anew.
    assert tasks <= before[0] + 8
    assert descriptors <= before[1] + 8
    assert process.memory_info().rss - memory < 64 << 20
    assert split.decode.received
    assert split.decode.cancelled
    split.decode.script = lambda _: [260, EOS]
    assert (await split.front.chat()).status_code == 200
