"""Tokens that go to the client where they come up, past the task that waits for the answer's end."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import orjson
import pytest
from starlette.types import Scope

from fixtures.frontend import ANSWER, Split, chunks_of
from kvmesh.frontend.http.protocol import _BoundedProtocol
from kvmesh.frontend.routes.answer import AnswerResponse, _Events
from kvmesh.frontend.serving.session import Session
from kvmesh.frontend.serving.text import Delta


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of what went past the task."""
    texts: list[str] = []
    original = _Events.put

    def watched(self: _Events, delta: Delta) -> None:
        texts.append(delta.text)
        original(self, delta)

    monkeypatch.setattr(_Events, "put", watched)
    return texts


def text_of(body: str) -> str:
    return "".join(
        chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks_of(body) if chunk["choices"]
    )


async def test_pieces_go_past_the_task_and_nothing_is_lost(
    split: Split, put: list[str], answer_ids: list[int]
) -> None:
    split.decode.step_s = 0.01
    response = await split.front.chat(stream=True, stream_options={"include_usage": True})
    assert text_of(response.text) == ANSWER
    assert put, "every piece was waited for by the task"
    assert "".join(put) in ANSWER
    assert chunks_of(response.text)[-1]["usage"]["completion_tokens"] == len(answer_ids)
    await split.idle()


async def test_a_stop_string_on_the_way_ends_the_answer(split: Split, put: list[str]) -> None:
    split.decode.step_s = 0.01
    response = await split.front.chat(stream=True, stop=[" Paris. 🗼"])
    last = chunks_of(response.text)[-1]["choices"][0]
    assert (text_of(response.text), last["finish_reason"]) == ("The capital of France is", "stop")
    assert put
    await split.idle()
    assert split.decode.cancelled


@pytest.mark.parametrize(
    "fields", [{"stream": False}, {"stream": True, "n": 2}, {"stream": True, "logprobs": True}]
)
async def test_what_is_more_than_plain_text_is_the_tasks(
    split: Split, put: list[str], fields: dict[str, Any]
) -> None:
    split.decode.step_s = 0.005
    response = await split.front.chat(**fields)
    assert response.status_code == 200
    assert not put
    await split.idle()


async def test_a_fault_on_the_way_ends_one_answer_only(
    split: Split, put: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both answers' tokens come in the same messages; only one of them cannot be written."""
    split.decode.step_s = 0.02
    original = _BoundedProtocol.write
    broken: list[_BoundedProtocol] = []

    def write(self: _BoundedProtocol, chunk: bytes) -> None:
        if not broken:
            broken.append(self)
        if self is broken[0]:
            raise RuntimeError("cannot write")
        original(self, chunk)

    monkeypatch.setattr(_BoundedProtocol, "write", write)
    answers = await asyncio.gather(split.front.chat(stream=True), split.front.chat(stream=True))
    events = [answer.text.split("\n\n") for answer in answers]
    whole = [answer for answer in answers if answer.text.endswith("data: [DONE]\n\n")]
    assert len(whole) == 1
    assert text_of(whole[0].text) == ANSWER
    (failed,) = (parts for parts in events if parts[-2] != "data: [DONE]")
    assert orjson.loads(failed[-2].removeprefix("data: "))["error"]["code"] == "internal_error"
    await split.idle()


async def test_a_client_that_falls_behind_now_and_then_gets_all_in_order(
    split: Split, put: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, asked = _BoundedProtocol.can_write, 0

    def can_write(self: _BoundedProtocol, scope: Scope) -> bool:
        nonlocal asked
        asked += 1
        return asked % 3 != 0 and original(self, scope)

    monkeypatch.setattr(_BoundedProtocol, "can_write", can_write)
    split.decode.step_s = 0.005
    response = await split.front.chat(stream=True)
    assert text_of(response.text) == ANSWER
    assert put
    assert len(put) < asked
    await split.idle()


async def test_an_answer_that_is_over_is_freed_without_a_collection(split: Split, put: list[str]) -> None:
    """Hundreds of objects each: collections that look for them would be most of what a request costs."""
    split.decode.step_s = 0.005
    # What starting up and a first request leave behind.
    await split.front.chat(stream=True)
    gc.collect()
    gc.disable()
    try:
        await split.front.chat(stream=True)
        await split.idle()
        # By type: some of what lives here warns when it is asked for its class.
        kept = [each for each in gc.get_objects() if type(each) in (AnswerResponse, Session)]
    finally:
        gc.enable()
    assert put
    assert not kept
