"""Bad input: a clean answer, and nothing left behind."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from tokenizers import Tokenizer

from fixtures.frontend import (
    CONTEXT_LENGTH,
    MODEL,
    Split,
    error_of,
    frontend,
    hello,
    make,
)
from fixtures.scripted_worker import ROLE_AGGREGATED


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "gpt-5"}, 404, "model_not_found", "model"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"temperature": 9}, 400, "invalid_value", "temperature"),
        ({"max_tokens": "many"}, 400, "invalid_value", "max_tokens"),
        ({"n": 129}, 400, "invalid_value", "n"),
        ({"functions": [{}]}, 400, "invalid_value", "functions[0].name"),
        ({"logit_bias": {"49152": 1}}, 400, "invalid_value", "logit_bias"),
        ({"guided_json": "{"}, 400, "invalid_value", "guided_json"),
        ({"tool_choice": "required"}, 400, "invalid_value", "tool_choice"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "unsupported_parameter",
            "messages[0].content[0].type",
        ),
        ({"stop_token_ids": [49152]}, 400, "invalid_value", "stop_token_ids"),
        ({"min_tokens": 9, "max_tokens": 3}, 400, "invalid_value", "min_tokens"),
        (
            {"messages": [{"role": "user", "content": "word " * 600}]},
            400,
            "context_length_exceeded",
            "messages",
        ),
        ({"chat_template_kwargs": {"tools": 1}}, 400, "unsupported_parameter", "chat_template_kwargs.tools"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_fields(
    split: Split, fields: dict[str, Any], status: int, code: str, param: str, stream: bool
) -> None:
    response = await split.front.http.post("/v1/chat/completions", json=hello(**fields, stream=stream))
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert response.headers["x-request-id"]
    await split.idle()
    assert not split.decode.received
    assert not split.front.router.requests


async def test_context_length_error_has_both_counts(split: Split, tokenizer: Tokenizer) -> None:
    prompt = [7] * 600
    response = await split.front.http.post("/v1/completions", json={"model": MODEL, "prompt": prompt})
    error = error_of(response)
    assert error["code"] == "context_length_exceeded"
    assert str(CONTEXT_LENGTH) in error["message"]
    assert "600" in error["message"]


@pytest.mark.parametrize("token", [-1, 49152, 2**31, 2**32, 2**63, 2**64 - 1])
async def test_token_ids_outside_the_vocabulary(split: Split, token: int) -> None:
    for prompt in ([5, token], [[5, 6], [token]]):
        response = await split.front.http.post("/v1/completions", json={"model": MODEL, "prompt": prompt})
        assert (response.status_code, error_of(response)["param"]) == (400, "prompt")
    assert not split.decode.received
    await split.idle()


@pytest.mark.parametrize("raw", [b"", b"{", b"not json", b"[1]", b"\xff\xfe", b'{"a":' * 3000])
async def test_malformed_json(split: Split, raw: bytes) -> None:
    response = await split.front.http.post("/v1/chat/completions", content=raw)
    assert (response.status_code, error_of(response)["type"]) == (400, "invalid_request_error")


async def test_wrong_method_and_path(split: Split) -> None:
    response = await split.front.http.get("/v1/completions")
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    response = await split.front.http.put("/v1/chat/completions", json={})
    assert response.headers["allow"] == "GET, HEAD, POST"
    assert error_of(response)["message"].endswith("use GET, HEAD, POST")
    response = await split.front.http.post("/v1/nothing", json={})
    assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
    # No name is not the default's.
    response = await split.front.http.get("/v1/models/")
    assert (response.status_code, error_of(response)["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/default", "/v1/chat/completions"])
async def test_a_head_is_a_get_without_its_body(split: Split, path: str) -> None:
    whole, head = await split.front.http.get(path), await split.front.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))
    assert 0 <= int(whole.headers["openai-processing-ms"]) <= whole.elapsed.total_seconds() * 1000
    assert (await split.front.http.head("/v1/completions")).status_code == 405


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/tokenize"])
async def test_packed_bodies_are_refused_by_name(split: Split, path: str) -> None:
    packed = gzip.compress(orjson.dumps(hello()))
    response = await split.front.http.post(path, content=packed, headers={"content-encoding": "gzip"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (415, "unsupported_content_type")
    assert response.headers["accept-encoding"] == "identity"
    assert (error["param"], "'gzip'" in error["message"]) == ("content-encoding", True)
    plain = await split.front.http.post(
        path, content=orjson.dumps(hello(max_tokens=1)), headers={"content-encoding": "identity"}
    )
    assert plain.status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/tokenize"])
async def test_bodies_are_json(split: Split, path: str) -> None:
    body = orjson.dumps(hello(max_tokens=1))
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        response = await split.front.http.post(path, content=body, headers={"content-type": kind})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (415, "unsupported_content_type")
        assert (error["param"], response.headers["accept-post"]) == ("content-type", "application/json")
    assert not split.decode.received
    for kind in ("application/json", "Application/JSON ; charset=utf-8", "application/vnd.api+json", ""):
        response = await split.front.http.post(path, content=body, headers={"content-type": kind})
        assert response.status_code == 200, kind
    assert (await split.front.http.post(path, content=body)).status_code == 200


async def test_oversized_bodies(answer_ids: list[int]) -> None:
    async with frontend(max_body_bytes=1000) as front:
        worker = make(ROLE_AGGREGATED, answer_ids)
        await front.join(worker)

        async def chunked() -> AsyncIterator[bytes]:
            for _ in range(50):
                yield b" " * 1000

        for content in (b" " * 50_000, chunked()):
            response = await front.http.post("/v1/chat/completions", content=content)
            assert (response.status_code, error_of(response)["code"]) == (413, "payload_too_large")
        assert (await front.chat()).status_code == 200
        await worker.kill()
