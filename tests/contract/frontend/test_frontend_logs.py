"""Logs are no place for keys, nor for prompts unless an operator asks for them."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from fixtures.frontend import MODEL, Frontend, Split, frontend, hello
from fixtures.logs import logged
from fixtures.tenanted import Tenanted
from fixtures.waiting import eventually
from kvmesh.frontend.serving.session import Session
from kvmesh.v1.errors_pb2 import Error, ErrorCode
from kvmesh.v1.frontend_pb2 import ChatMessage, ChatRequest

WORDS = "mellon speak friend"
WRONG_KEY = "kvm-wrong-and-secret"


async def ask_for_all_that_fails(front: Frontend, key: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses of requests that are wrong, refused, or fail inside."""
    mine = {"authorization": f"Bearer {key}"}
    messages = [{"role": "user", "content": WORDS}]
    asked: list[tuple[str, Any, dict[str, str]]] = [
        ("/v1/chat/completions", hello(messages=messages), {"authorization": f"Bearer {WRONG_KEY}"}),
        ("/v1/chat/completions", hello(messages=messages, temperature=WORDS), mine),
        ("/v1/chat/completions", hello(messages=[{"role": WORDS, "content": WORDS}]), mine),
        ("/v1/chat/completions", hello(messages=messages, model=WORDS), mine),
        ("/v1/chat/completions", f'{{"messages": "{WORDS}', mine),
        ("/v1/completions", {"model": MODEL, "prompt": WORDS * 1000}, mine),
    ]
    statuses = []
    for path, body, headers in asked:
        sent: dict[str, Any] = {"content": body} if isinstance(body, str) else {"json": body}
        statuses.append((await front.http.post(path, headers=headers, **sent)).status_code)

    async def broken(self: Session) -> None:
        raise ZeroDivisionError("what nobody thought of")

    monkeypatch.setattr(Session, "start", broken)
    for path, body in (
        ("/v1/chat/completions", hello(messages=messages, stream=True)),
        ("/v1/completions", {"model": MODEL, "prompt": WORDS}),
        ("/v1/responses", {"model": MODEL, "input": WORDS, "background": True}),
    ):
        statuses.append((await front.http.post(path, json=body, headers=mine)).status_code)
    request = ChatRequest(messages=[ChatMessage(role="user", content=WORDS)])
    with pytest.raises(grpc.aio.AioRpcError):
        await front.grpc.Chat(request, metadata=tuple(mine.items())).read()
    await eventually(lambda: not front.gateway.runs._live)
    return statuses


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_neither_keys_nor_prompts_are_logged(
    one: Tenanted, log_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = await one.key()
    with logged("frontend", log_format=log_format, log_level="debug") as stream:
        one.worker.failure = Error(code=ErrorCode.ERROR_CODE_ENGINE_FAILED, message="out of order")
        one.worker.fail_at = 2
        body = hello(messages=[{"role": "user", "content": WORDS}], stream=True)
        headers = {"authorization": f"Bearer {key}"}
        assert (
            "out of order"
            in (await one.front.http.post("/v1/chat/completions", json=body, headers=headers)).text
        )
        statuses = await ask_for_all_that_fails(one.front, key, monkeypatch)
        assert statuses == [401, 400, 400, 404, 400, 400, 500, 500, 200]
    text = stream.getvalue()
    # They were seen to, with the place where they failed.
    assert text.count("ZeroDivisionError: what nobody thought of") == 4
    assert "answer broken off" in text
    for secret in (*WORDS.split(), key, WRONG_KEY):
        assert secret not in text


async def test_prompts_are_logged_where_they_are_asked_for(split: Split) -> None:
    async with frontend(log_prompts=True, discovery=split.front.discovery) as front:
        await eventually(lambda: front.models.ready, 30, "the frontend to be ready")
        with logged("frontend", log_format="json") as stream:
            await front.chat(WORDS, n=2)
            await split.front.chat(WORDS)
    assert stream.getvalue().count(WORDS) == 1
