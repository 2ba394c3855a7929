"""Workers and routers that fail on the way."""

from __future__ import annotations

import asyncio

import openai
import orjson
import pytest

from fixtures.frontend import (
    EOS,
    EXPLAIN,
    Split,
    endless,
    error_of,
    frontend,
    hello,
    make,
)
from fixtures.scripted_worker import ROLE_AGGREGATED, ROLE_DECODE, ROLE_PREFILL, retryable_error
from fixtures.waiting import eventually
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.v1.engine_pb2 import EngineRequest
from kvmesh.v1.errors_pb2 import Error, ErrorCode


async def test_tried_elsewhere_before_the_first_token(split: Split, answer_ids: list[int]) -> None:
    other = make(ROLE_DECODE, answer_ids, 1)
    await split.front.join(other)
    split.decode.failure = retryable_error()
    for _ in range(4):
        response = await split.front.chat(kvmesh={"explain": True, "deadline_ms": 10_000})
        assert response.status_code == 200
        assert response.json()["kvmesh"]["placement"]["decode"] == "decode-1"
    again = {bool(route.exclude_worker_ids) for route in split.front.router.requests}
    assert again == {False, True}
    for route in split.front.router.requests:
        # Who was placed in time is not refused for being late.
        assert (route.deadline_ms > 10_000) == bool(route.exclude_worker_ids)
    await eventually(lambda: split.front.idle(split.prefill, split.decode, other), timeout=2)
    await other.kill()


async def test_failed_prefill_is_tried_elsewhere(split: Split, answer_ids: list[int]) -> None:
    other = make(ROLE_PREFILL, answer_ids, 1)
    await split.front.join(other)
    split.prefill.failure = retryable_error()
    # The decode half of a request whose prefill failed would wait for ever.
    split.decode.stall.clear()
    asking = [asyncio.create_task(split.front.chat(**EXPLAIN)) for _ in range(4)]
    await eventually(lambda: len(other.received) == 4, timeout=5)
    split.decode.stall.set()
    for response in await asyncio.gather(*asking):
        assert response.status_code == 200
        assert response.json()["kvmesh"]["placement"]["prefill"] == "prefill-1"
    assert split.prefill.received
    await eventually(lambda: split.front.idle(split.prefill, split.decode, other), timeout=2)
    await other.kill()


async def test_error_that_no_retry_helps(split: Split) -> None:
    split.decode.failure = Error(
        code=ErrorCode.ERROR_CODE_INVALID_ARGUMENT, message="no such thing", param="seed"
    )
    response = await split.front.chat()
    assert (response.status_code, error_of(response)["param"]) == (400, "seed")
    assert len(split.decode.received) == 1
    await split.idle()


async def test_only_worker_fails(split: Split) -> None:
    split.decode.failure = retryable_error("the engine is full")
    response = await split.front.chat()
    error = error_of(response)
    assert (response.status_code, error["message"]) == (503, "the engine is full")
    assert response.headers["retry-after"]
    assert 1 < len(split.decode.received) <= 4
    await split.idle()


async def test_worker_killed_before_the_first_token(split: Split, answer_ids: list[int]) -> None:
    split.decode.stall.clear()
    other = make(ROLE_DECODE, answer_ids, 1)
    asking = asyncio.create_task(split.front.chat(**EXPLAIN))
    await eventually(lambda: split.decode.live)
    await split.front.join(other)
    await split.decode.kill()
    response = await asking
    assert response.status_code == 200
    assert response.json()["kvmesh"]["placement"]["decode"] == "decode-1"
    await eventually(lambda: split.front.idle(split.prefill, other), timeout=2)
    await other.kill()


async def test_restarted_worker_serves_the_next_request(split: Split) -> None:
    assert (await split.front.chat()).status_code == 200
    await split.decode.kill()
    split.decode.incarnation += 1
    await split.decode.start()
    split.front.discovery.put(split.decode.info())
    assert (await split.front.chat()).status_code == 200


async def test_worker_lost_in_mid_stream(split: Split) -> None:
    split.decode.script = endless
    split.decode.step_s = 0.01
    stream = await split.front.openai.chat.completions.create(**hello(stream=True))
    pieces = 0

    async def read() -> None:
        nonlocal pieces
        async for _ in stream:
            pieces += 1
            if pieces == 5:
                await split.decode.kill()

    with pytest.raises(openai.APIError, match=r"worker decode-0 was lost"):
        await read()
    assert pieces >= 5
    await eventually(lambda: split.front.idle(split.prefill), timeout=2)


async def test_broken_stream_ends_with_an_error_event(split: Split) -> None:
    split.fail_decoding(retryable_error("gone"), 3)
    response = await split.front.chat(stream=True)
    assert response.status_code == 200
    last = response.text.rstrip("\n").split("\n\n")[-1]
    assert orjson.loads(last.removeprefix("data: "))["error"]["message"] == "gone"
    assert "[DONE]" not in response.text
    await split.idle()


async def test_request_timeout(answer_ids: list[int]) -> None:
    async with frontend(request_timeout_s=0.3) as front:
        worker = make(ROLE_AGGREGATED, answer_ids)
        worker.stall.clear()
        await front.join(worker)
        response = await front.chat()
        assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
        await eventually(lambda: front.idle(worker), timeout=2)
        await worker.kill()


async def test_without_a_router(answer_ids: list[int]) -> None:
    async with frontend(with_router=False) as front:
        members = [make(ROLE_PREFILL, answer_ids), *(make(ROLE_DECODE, answer_ids, i) for i in range(2))]
        await front.join(*members)
        used = set()
        for _ in range(4):
            explained = (await front.chat(**EXPLAIN)).json()["kvmesh"]
            assert explained["policy"] == "fallback"
            used.add(explained["placement"]["decode"])
        assert used == {"decode-0", "decode-1"}
        await eventually(lambda: front.idle(*members), timeout=2)
        for member in members:
            await member.kill()


async def test_router_that_has_just_started(split: Split) -> None:
    """It knows no worker yet; discovery does."""
    split.front.router.refusal = KvmeshError(ErrorCode.ERROR_CODE_NO_WORKER_READY, "nobody here")
    response = await split.front.chat(**EXPLAIN)
    assert (response.status_code, response.json()["kvmesh"]["policy"]) == (200, "fallback")
    split.front.router.refusal = None
    assert (await split.front.chat(**EXPLAIN)).json()["kvmesh"]["policy"] == "scripted"


@pytest.mark.parametrize(
    ("refusal", "status", "param"),
    [
        (invalid("unknown policy", "policy"), 400, "kvmesh.policy"),
        (KvmeshError(ErrorCode.ERROR_CODE_OVERLOADED, "too much", retry_after_ms=2_500), 503, None),
    ],
)
async def test_router_that_refuses(
    split: Split, refusal: KvmeshError, status: int, param: str | None
) -> None:
    split.front.router.refusal = refusal
    response = await split.front.chat(stream=True)
    assert (response.status_code, error_of(response)["param"]) == (status, param)
    assert response.headers.get("retry-after") == ("3" if status == 503 else None)
    assert not split.decode.received
    await split.idle()


async def test_a_router_that_says_nothing_is_done_without(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmesh.frontend.mesh.routers.FIRST_WORD_S", 0.2)
    router = split.front.router
    router.gate.clear()
    answer = (await split.front.chat(**EXPLAIN)).json()["kvmesh"]
    assert answer["policy"] == "fallback"
    await eventually(lambda: len(router.cancels) == 1)
    router.gate.set()
    await split.idle()


async def test_a_router_that_holds_is_waited_for(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmesh.frontend.mesh.routers.FIRST_WORD_S", 2.0)
    router = split.front.router
    router.holds = True
    router.gate.clear()
    asking = asyncio.create_task(split.front.chat(**EXPLAIN))
    await asyncio.sleep(2.5)
    router.gate.set()
    assert (await asking).json()["kvmesh"]["policy"] == "scripted"
    assert not router.cancels
    await split.idle()


async def test_a_router_that_holds_for_longer_than_the_request_may_last() -> None:
    async with frontend(request_timeout_s=1.0) as front:
        worker = make(ROLE_AGGREGATED, [300, EOS])
        await front.join(worker)
        front.router.holds = True
        front.router.gate.clear()
        response = await front.chat()
        assert (response.status_code, error_of(response)["code"]) == (504, "deadline_exceeded")
        await eventually(lambda: len(front.router.cancels) == 1)
        assert not worker.received
        await worker.kill()


async def test_the_router_hears_of_the_prompt_the_transfer_and_the_first_token(split: Split) -> None:
    reports = split.front.router.reports
    split.decode.stall.clear()
    asking = asyncio.create_task(split.front.chat())
    await eventually(lambda: any(report.prefill_done for report in reports))
    assert all(report.output_tokens == 0 for report in reports)
    split.decode.step_s = 0.5
    split.decode.stall.set()
    await eventually(lambda: any(report.output_tokens for report in reports))
    first = next(report for report in reports if report.prefill_done)
    assert (first.transfer_ms, first.ended) == (3.0, False)
    assert (await asking).status_code == 200


async def test_long_requests_keep_their_lease(split: Split) -> None:
    split.decode.stall.clear()
    asking = asyncio.create_task(split.front.chat())
    # The lease's time to live is 2 s; nothing has moved, and yet it is renewed.
    await eventually(lambda: len(split.front.router.reports) >= 3, timeout=5)
    assert not any(report.ended for report in split.front.router.reports)
    split.decode.stall.set()
    assert (await asking).status_code == 200
    await split.idle()
    last = split.front.router.reports[-1]
    assert (last.ended, last.prefill_done) == (True, True)
    assert last.output_tokens == len(split.decode.script(EngineRequest()))
