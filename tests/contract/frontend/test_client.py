"""kvmesh-client against a real frontend: both clients, and what they make of failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, closing

import grpc
import pytest

from fixtures.frontend import ANSWER, MODEL, Split, endless
from fixtures.waiting import eventually
from kvmesh.client import AsyncClient, Client, RequestError

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def client(split: Split) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(split.front.grpc_address) as client:
        yield client


async def test_a_chat_comes_in_pieces(client: AsyncClient) -> None:
    pieces = [piece async for piece in client.chat(MESSAGES, temperature=0, explain=True)]
    assert "".join(piece.text for piece in pieces) == ANSWER
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].usage.completion_tokens > 1
    assert pieces[-1].kvmesh.mode == "disaggregated"


async def test_prompts_are_told_apart(client: AsyncClient) -> None:
    texts = ["", ""]
    async for piece in client.complete(["one", "other"], max_new_tokens=4):
        texts[piece.index] += piece.text
    assert texts[0] == texts[1] != ""
    ids = [piece async for piece in client.complete([5, 6, 7], max_new_tokens=1)]
    assert ids[-1].usage.prompt_tokens == 3


async def test_the_client_for_threads_says_the_same(split: Split) -> None:
    def use() -> tuple[str, list[str]]:
        with Client(split.front.grpc_address) as client:
            text = "".join(piece.text for piece in client.chat(MESSAGES, temperature=0))
            return text, [model.name for model in client.models()]

    assert await asyncio.to_thread(use) == (ANSWER, [MODEL])


async def test_failures_say_what_the_frontend_says(client: AsyncClient) -> None:
    with pytest.raises(RequestError, match="served: smol") as caught:
        await client.embed("x", model="nobody")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert not caught.value.retryable
    with pytest.raises(RequestError, match="no capability `embed`") as caught:
        await client.embed("x")
    assert caught.value.code == "unsupported"
    with pytest.raises(RequestError) as caught:
        async for _ in client.chat([]):
            pass
    assert caught.value.param == "messages"


async def test_a_frontend_that_is_not_there() -> None:
    def use() -> RequestError:
        with Client("127.0.0.1:1", timeout=5) as client, pytest.raises(RequestError) as caught:
            client.models()
        return caught.value

    error = await asyncio.to_thread(use)
    assert (error.status, error.code, error.retryable) == (grpc.StatusCode.UNAVAILABLE, "unspecified", True)


async def test_leaving_cancels_the_answer(split: Split, client: AsyncClient) -> None:
    split.decode.script = endless
    split.decode.step_s = 0.005
    async with aclosing(client.chat(MESSAGES)) as pieces:
        await anext(pieces)
    await split.idle()

    def leave() -> None:
        with Client(split.front.grpc_address) as client, closing(client.chat(MESSAGES)) as pieces:
            next(pieces)

    await asyncio.to_thread(leave)
    await eventually(lambda: split.front.idle(split.prefill, split.decode), 5, "nothing to be left")
