"""Clients that leave: everything of theirs ends at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import httpx
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


async def test_200_random_disconnects_leak_nothing(split: Split) -> None:
    split.decode.script = endless
    split.decode.step_s = 0.002
    rng = random.Random(3)
    limit = asyncio.Semaphore(20)

    async def one() -> None:
        async with limit, httpx.AsyncClient(base_url=split.front.url) as client:
            asking = asyncio.create_task(
                client.post("/v1/chat/completions", json=hello(stream=rng.random() < 0.5))
            )
            await asyncio.sleep(rng.random() * 0.1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    await asyncio.gather(*(one() for _ in range(200)))
    await split.idle()
    split.decode.script = lambda _: [260, EOS]
    assert (await split.front.chat()).status_code == 200
