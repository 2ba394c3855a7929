"""Answers whose worker is lost on the way: another one goes on, and the client sees one answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from fixtures.frontend import ANSWER, EXPLAIN, Split, chunks_of, error_of, frontend, hello, make
from fixtures.scripted_worker import (
    ROLE_AGGREGATED,
    ROLE_DECODE,
    ROLE_PREFILL,
    ScriptedWorker,
    retryable_error,
)
from fixtures.waiting import eventually
from kvmesh.common.errors import invalid
from kvmesh.v1.engine_pb2 import EngineRequest
from kvmesh.v1.errors_pb2 import Error, ErrorCode


def rest_of(answer: list[int], prompt: int) -> Callable[[EngineRequest], list[int]]:
    """A script that goes on where the tokens behind a prompt of this length leave off."""
    return lambda request: answer[len(request.token_ids) - prompt :]


@pytest.fixture
async def second(split: Split, answer_ids: list[int]) -> AsyncIterator[ScriptedWorker]:
    """A decode worker that goes on with what `split.decode` has begun."""
    other = make(ROLE_DECODE, answer_ids, 1)
    other.script = lambda request: rest_of(answer_ids, len(split.decode.received[0].token_ids))(request)
    yield other
    await eventually(lambda: split.front.idle(split.prefill, split.decode, other), timeout=2)
    await other.kill()


async def ask(split: Split, second: ScriptedWorker, **fields: Any) -> httpx.Response:
    """Ask while there is one decode worker; it fails once there are two and the answer has begun."""
    worker = split.decode
    worker.gate_at = worker.fail_at
    asking = asyncio.create_task(split.front.chat(**fields))
    await eventually(lambda: worker.live)
    await split.front.join(second)
    await eventually(lambda: begun(split) == worker.fail_at)
    worker.gate.set()
    return await asking


def begun(split: Split) -> int:
    """Tokens that answers under way have been given."""
    return sum(session.output_tokens for session in split.front.mesh.sessions)


@pytest.mark.parametrize("stream", [False, True])
async def test_another_worker_goes_on(split: Split, second: ScriptedWorker, stream: bool) -> None:
    split.decode.failure, split.decode.fail_at = retryable_error("gone"), 5
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = await ask(split, second, **options, **EXPLAIN)
    assert response.status_code == 200
    if stream:
        chunks = chunks_of(response.text)
        text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
        said = next(c["kvmesh"] for c in chunks if "kvmesh" in c)
        used = next(c["usage"] for c in chunks if c.get("usage"))
    else:
        body = response.json()
        text, said, used = body["choices"][0]["message"]["content"], body["kvmesh"], body["usage"]
    assert text == ANSWER
    assert said["placement"]["decode"] == "decode-0"
    assert said["placement"]["continued_on"] == ["decode-1"]
    # One prompt and one answer, whoever gave which part of it.
    (begun,), (taken_over,) = split.decode.received, second.received
    assert used["prompt_tokens"] == len(begun.token_ids)
    details = used["prompt_tokens_details"]
    assert details["cached_tokens"] == sum(details["kvmesh_cached_tokens"].values()) == 16
    assert details["kvmesh_cached_tokens"] == said["cached_tokens"]
    assert len(taken_over.token_ids) == len(begun.token_ids) + 5
    assert taken_over.sampling.max_new_tokens == begun.sampling.max_new_tokens - 5
    # The KV of what is there already is a prefill worker's affair again.
    assert len(split.prefill.received) == 2


async def test_a_killed_worker_is_no_error_to_the_client(split: Split, second: ScriptedWorker) -> None:
    split.decode.step_s = 0.02
    stream = await split.front.openai.chat.completions.create(**hello(stream=True))
    await split.front.join(second)
    text = ""
    async for chunk in stream:
        if not text:
            await split.decode.kill()
        text += chunk.choices[0].delta.content or ""
    assert text == ANSWER
    assert second.received


async def test_the_only_worker_is_waited_for(answer_ids: list[int]) -> None:
    async with frontend(recovery_s=30) as front:
        worker = make(ROLE_AGGREGATED, answer_ids)
        worker.step_s, first = 0.02, worker.incarnation
        await front.join(worker)
        stream = await front.openai.chat.completions.create(**hello(stream=True))
        text = ""
        async for chunk in stream:
            if text and worker.incarnation == first:
                await worker.kill()
                # Discovery lists the dead process for some time yet.
                await asyncio.sleep(1)
                worker.port = 0
                worker.script = rest_of(answer_ids, len(worker.received[0].token_ids))
                worker.incarnation += 1
                await worker.start()
                front.discovery.put(worker.info())
            text += chunk.choices[0].delta.content or ""
        assert text == ANSWER
        assert len(worker.received) == 2
        await eventually(lambda: front.idle(worker), timeout=2)
        await worker.kill()


async def test_a_worker_that_comes_is_taken_though_a_dead_one_is_still_listed(answer_ids: list[int]) -> None:
    async with frontend(recovery_s=30) as front:
        dead, comes = make(ROLE_AGGREGATED, answer_ids), make(ROLE_AGGREGATED, answer_ids, 1)
        dead.step_s = 0.02
        await front.join(dead)
        stream = await front.openai.chat.completions.create(**hello(stream=True))
        text = ""
        async for chunk in stream:
            if text and dead.live:
                await dead.kill()
                comes.script = rest_of(answer_ids, len(dead.received[0].token_ids))
                await asyncio.sleep(0.5)
                await front.join(comes)
            text += chunk.choices[0].delta.content or ""
        assert text == ANSWER
        assert len(comes.received) == 1
        await eventually(lambda: front.idle(comes), timeout=2)
        await comes.kill()


async def test_who_says_that_the_other_half_was_lost_is_not_lost(answer_ids: list[int]) -> None:
    """A prefill worker dies with the decode worker, and is listed until after that one has come back."""
    message = "the prefill engine cannot be reached"
    async with frontend(recovery_s=30) as front:
        front.mesh.listed_s = 20.0
        dead, comes = (make(ROLE_DECODE, answer_ids, number) for number in range(2))
        gone, prefill = (make(ROLE_PREFILL, answer_ids, number) for number in range(2))
        dead.step_s = 0.02
        await front.join(dead, gone)
        stream = await front.openai.chat.completions.create(**hello(stream=True))
        text, began = "", 0.0
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if text and not comes.received:
                await dead.kill()
                comes.script = rest_of(answer_ids, len(dead.received[0].token_ids))
                lost = Error(code=ErrorCode.ERROR_CODE_WORKER_LOST, message=message, retryable=True)
                comes.failure, comes.fail_at = lost, 0
                await front.join(comes)
                await eventually(lambda: comes.received)
                comes.failure, began = None, time.monotonic()
                await front.join(prefill)
        assert text == ANSWER
        # Well before the one that is thought lost would be asked again.
        assert time.monotonic() - began < front.mesh.listed_s / 2
        assert prefill.received
        await eventually(lambda: front.idle(comes, prefill, gone), timeout=2)
        for worker in (comes, prefill, gone):
            await worker.kill()


async def test_the_router_hears_of_each_part(
    split: Split, second: ScriptedWorker, answer_ids: list[int]
) -> None:
    split.decode.failure, split.decode.fail_at = retryable_error(), 5
    assert (await ask(split, second)).status_code == 200
    reports = split.front.router.reports
    await eventually(lambda: sum(report.ended for report in reports) == 2)
    assert [report.output_tokens for report in reports if report.ended] == [5, len(answer_ids) - 5]
    first, rest = split.front.router.requests
    assert rest.prompt_tokens == first.prompt_tokens + 5


@pytest.mark.parametrize("asked", [{"presence_penalty": 0.5}, {"response_format": {"type": "json_object"}}])
async def test_what_only_the_lost_engine_knew_is_not_guessed(
    split: Split, second: ScriptedWorker, asked: dict[str, Any]
) -> None:
    split.decode.failure, split.decode.fail_at = retryable_error("gone"), 5
    response = await ask(split, second, **asked)
    assert (response.status_code, error_of(response)["message"]) == (503, "gone")
    assert not second.received


async def test_errors_that_would_be_the_same_elsewhere_end_the_answer(
    split: Split, second: ScriptedWorker
) -> None:
    split.decode.failure, split.decode.fail_at = invalid("no such thing", "seed").to_proto(), 5
    response = await ask(split, second)
    assert (response.status_code, error_of(response)["param"]) == (400, "seed")
    assert not second.received


async def test_a_request_that_takes_every_worker_down_is_given_up(split: Split) -> None:
    split.decode.failure, split.decode.fail_at = retryable_error(), 5
    response = await split.front.chat()
    assert (response.status_code, error_of(response)["code"]) == (503, "overloaded")
    assert len(split.decode.received) == 4
    await split.idle()
