"""Anthropic's client against a frontend with scripted workers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import anthropic
import pytest
from tokenizers import Tokenizer

from fixtures.frontend import ANSWER, CONTEXT_LENGTH, EOS, MODEL, Split, endless
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.errors_pb2 import Error, ErrorCode

TOOLS: Any = [{"name": name, "input_schema": {"type": "object"}} for name in ("f", "g")]
CALLS = [{"name": "f", "arguments": {"city": "Paris é"}}, {"name": "g", "arguments": {}}]
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def client(split: Split) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=split.front.url, api_key="none", max_retries=0) as client:
        yield client
    await split.idle()


def answers(split: Split, tokenizer: Tokenizer, text: str) -> None:
    ids = [*tokenizer.encode(text, add_special_tokens=False).ids, EOS]
    split.prefill.script = split.decode.script = lambda _: ids


def said(error: anthropic.APIStatusError) -> dict[str, Any]:
    assert isinstance(error.body, dict)
    return error.body


def prompt(split: Split, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(list(split.decode.received[-1].token_ids), skip_special_tokens=False)


async def test_a_message(split: Split, client: Any, tokenizer: Tokenizer) -> None:
    message = await client.messages.create(
        model="default",
        max_tokens=50,
        system=[{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
        messages=HELLO,
        metadata={"user_id": "me"},
        extra_body={"top_k": 3},
    )
    (block,) = message.content
    assert block.type == "text"
    assert block.text == ANSWER
    assert (message.role, message.model, message.stop_reason) == ("assistant", MODEL, "end_turn")
    assert message.stop_sequence is None
    assert "Be brief.\nBe kind." in prompt(split, tokenizer)
    sent = split.decode.received[0]
    assert (sent.sampling.max_new_tokens, sent.sampling.top_k) == (50, 3)
    assert split.front.router.requests[0].session_id == "me"
    usage = message.usage
    cached = usage.cache_read_input_tokens or 0
    assert usage.input_tokens + cached == len(sent.token_ids)
    counted = await client.messages.count_tokens(
        model="default", system="Be brief.\nBe kind.", messages=HELLO
    )
    assert counted.input_tokens == len(sent.token_ids)
    assert counted._request_id


async def test_models_are_listed_as_its_clients_read_them(split: Split, client: Any) -> None:
    page = await client.models.list()
    (model,) = page.data
    assert (model.id, model.type, model.display_name, page.has_more) == (MODEL, "model", MODEL, False)
    assert (model.max_input_tokens, model.max_tokens) == (CONTEXT_LENGTH, CONTEXT_LENGTH)
    assert (page.first_id, page.last_id) == (MODEL, MODEL)
    one = await client.models.retrieve("default")
    assert (one.id, one.created_at) == (MODEL, model.created_at)
    listed = (await split.front.http.get("/v1/models")).json()["data"][0]
    assert one.created_at == datetime.fromtimestamp(listed["created"], UTC)


async def test_events_come_in_order(split: Split, client: Any) -> None:
    async with client.messages.stream(model=MODEL, max_tokens=50, messages=HELLO) as stream:
        message = await stream.get_final_message()
    assert message.content[0].text == ANSWER
    body = {"model": MODEL, "max_tokens": 50, "messages": HELLO, "stream": True}
    response = await split.front.http.post("/v1/messages", json=body)
    events = [event.split("\ndata: ") for event in response.text.split("\n\n")[:-1]]
    kinds = [name.removeprefix("event: ") for name, _ in events]
    assert kinds == [json.loads(data)["type"] for _, data in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_are_blocks(split: Split, client: Any, tokenizer: Tokenizer, stream: bool) -> None:
    answers(split, tokenizer, json.dumps(CALLS))
    wanted: Any = {
        "model": MODEL,
        "max_tokens": 100,
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": {"type": "any"},
    }
    if stream:
        async with client.messages.stream(**wanted) as events:
            message = await events.get_final_message()
    else:
        message = await client.messages.create(**wanted)
    assert message.stop_reason == "tool_use"
    assert [(b.name, b.input) for b in message.content] == [
        (call["name"], call["arguments"]) for call in CALLS
    ]
    assert all(block.id.startswith("toolu_") for block in message.content)
    assert json.loads(split.decode.received[0].sampling.constraint.json_schema)["maxItems"] > 1


async def test_a_named_tool_and_its_result(split: Split, client: Any, tokenizer: Tokenizer) -> None:
    answers(split, tokenizer, '{"a": 1}')
    first = await client.messages.create(
        model=MODEL,
        max_tokens=100,
        messages=HELLO,
        tools=TOOLS,
        tool_choice={"type": "tool", "name": "g", "disable_parallel_tool_use": True},
    )
    (call,) = first.content
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("g", {"a": 1})
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny", "is_error": True}
    more: Any = [
        *HELLO,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]},
    ]
    await client.messages.create(
        model=MODEL, max_tokens=9, messages=more, tools=TOOLS, tool_choice={"type": "none"}
    )
    text = prompt(split, tokenizer)
    assert text.index("Error: sunny") < text.index("and now?")
    assert not split.decode.received[1].sampling.HasField("constraint")


async def test_why_it_stopped(split: Split, client: Any) -> None:
    stopped = await client.messages.create(
        model=MODEL, max_tokens=50, messages=HELLO, stop_sequences=["nowhere", " Paris"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " Paris")
    assert stopped.content[0].text == "The capital of France is"
    split.prefill.script = split.decode.script = endless
    short = await client.messages.create(model=MODEL, max_tokens=4, messages=HELLO)
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 4)
    full = await client.messages.create(model=MODEL, max_tokens=10 * CONTEXT_LENGTH, messages=HELLO)
    assert full.stop_reason == "model_context_window_exceeded"


async def test_the_answer_goes_on_with_a_begun_turn(split: Split, client: Any, tokenizer: Tokenizer) -> None:
    begun: Any = [*HELLO, {"role": "user", "content": "well?"}, {"role": "assistant", "content": "The"}]
    await client.messages.create(model=MODEL, max_tokens=4, messages=begun)
    text = prompt(split, tokenizer)
    assert text.endswith("assistant\nThe")
    assert "hello\nwell?" in text


async def test_a_schema_for_the_answer(split: Split, client: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    await client.messages.create(model=MODEL, max_tokens=4, messages=HELLO, output_config=config)
    assert json.loads(split.decode.received[0].sampling.constraint.json_schema) == schema
    split.prefill.failure = split.decode.failure = Error(
        code=ErrorCode.ERROR_CODE_INVALID_ARGUMENT, message="cannot compile", param="constraint"
    )
    with pytest.raises(anthropic.BadRequestError) as caught:
        await client.messages.create(model=MODEL, max_tokens=4, messages=HELLO, output_config=config)
    assert said(caught.value)["error"]["param"] == "output_config.format.schema"


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"max_tokens": 0}, "invalid_request_error", "max_tokens"),
        ({"model": "none"}, "not_found_error", "model"),
        ({"messages": []}, "invalid_request_error", "messages"),
        ({"container": "c"}, "invalid_request_error", "container"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "invalid_request_error",
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            "invalid_request_error",
            "messages[0].content[0].tool_use_id",
        ),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "invalid_request_error", "tools[0].type"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "h"}},
            "invalid_request_error",
            "tool_choice",
        ),
        ({"tools": [{**TOOLS[0], "name": "a b"}]}, "invalid_request_error", "tools[0].name"),
        ({"stop_sequences": [""]}, "invalid_request_error", "stop_sequences[0]"),
        ({"messages": [{"role": "user", "content": "x " * 600}]}, "invalid_request_error", "messages"),
    ],
)
async def test_errors_are_anthropics(split: Split, fields: dict[str, Any], kind: str, param: str) -> None:
    body = {"model": MODEL, "max_tokens": 9, "messages": HELLO, **fields}
    response = await split.front.http.post("/v1/messages", json=body)
    answer = response.json()
    assert (answer["type"], answer["error"]["type"], answer["error"]["param"]) == ("error", kind, param)
    assert answer["request_id"] == response.headers["request-id"]
    assert not split.decode.received
    await split.idle()


async def test_failures_before_and_within_a_stream(split: Split, client: Any) -> None:
    body: Any = {"model": MODEL, "max_tokens": 50, "messages": HELLO}
    split.prefill.script = split.decode.script = endless
    gone = Error(code=ErrorCode.ERROR_CODE_ENGINE_FAILED, message="gone")
    split.fail_decoding(gone, 3)
    stream = await client.messages.create(**body, stream=True)
    with pytest.raises(anthropic.APIStatusError) as caught:
        _ = [event async for event in stream]
    assert said(caught.value)["error"]["message"] == "gone"
    with pytest.raises(anthropic.APIStatusError) as caught:
        await client.messages.create(**body)
    assert caught.value.status_code == 500
    split.front.router.refusal = KvmeshError(ErrorCode.ERROR_CODE_OVERLOADED, "full", retry_after_ms=1500)
    with pytest.raises(anthropic.APIStatusError) as caught:
        await client.messages.create(**body, stream=True)
    assert caught.value.status_code == 503
    assert said(caught.value)["error"]["type"] == "overloaded_error"
    assert caught.value.response.headers["retry-after"] == "2"
