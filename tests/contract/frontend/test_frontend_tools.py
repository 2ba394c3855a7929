"""Tools that must be called, and conversations that continue, before workers that tests script."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from fixtures.frontend import MODEL, Serve, Split, chunks_of, error_of, hello
from kvmesh.v1.common_pb2 import CAPABILITY_CONSTRAIN, CAPABILITY_GENERATE
from kvmesh.v1.errors_pb2 import Error, ErrorCode
from kvmesh.v1.router_pb2 import ReturnHint

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}, "strict": True}}
    for name in ("f", "g")
]
CALLS = [{"name": "f", "arguments": {"city": "Paris é"}}, {"name": "g", "arguments": {}}]


def answers(split: Split, tokenizer: Tokenizer, text: str) -> None:
    ids = [*tokenizer.encode(text, add_special_tokens=False).ids, 2]
    split.prefill.script = split.decode.script = lambda _: ids


async def test_required_calls(split: Split, tokenizer: Tokenizer) -> None:
    answers(split, tokenizer, json.dumps(CALLS))
    answer = await split.front.openai.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "x"}],
        tools=TOOLS,  # type: ignore[arg-type]
        tool_choice="required",
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    called = choice.message.tool_calls or []
    assert [json.loads(call.function.arguments) for call in called] == [  # type: ignore[union-attr]
        call["arguments"] for call in CALLS
    ]
    assert len({call.id for call in called}) == 2
    schema = json.loads(split.decode.received[0].sampling.constraint.json_schema)
    assert schema["type"] == "array"
    await split.idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("most", "names"), [(4, []), (30, ["f"])])
async def test_required_calls_that_length_cuts_are_no_text(
    split: Split, tokenizer: Tokenizer, stream: bool, most: int, names: list[str]
) -> None:
    ids = tokenizer.encode(json.dumps(CALLS), add_special_tokens=False).ids
    split.prefill.script = split.decode.script = lambda _: ids
    response = await split.front.chat(
        tools=TOOLS, tool_choice="required", max_tokens=most, stream=stream, logprobs=True
    )
    parts = [(chunk["choices"][0]) for chunk in (chunks_of(response.text) if stream else [response.json()])]
    said = [part["delta" if stream else "message"] for part in parts]
    assert not any(one.get("content") for one in said)
    calls = [call["function"] for one in said for call in one.get("tool_calls", ())]
    assert [call["name"] for call in calls if call.get("name")] == names
    assert parts[-1]["finish_reason"] == "length"
    assert sum(len((part["logprobs"] or {}).get("content", ())) for part in parts) == most
    await split.idle()


async def test_streamed_calls(split: Split, tokenizer: Tokenizer) -> None:
    answers(split, tokenizer, json.dumps(CALLS))
    async with split.front.openai.chat.completions.stream(
        model="default",
        messages=[{"role": "user", "content": "x"}],
        tools=TOOLS,  # type: ignore[arg-type]
        tool_choice="required",
    ) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    calls = final.choices[0].message.tool_calls or []
    assert [call.function.name for call in calls] == ["f", "g"]
    assert json.loads(calls[0].function.arguments) == CALLS[0]["arguments"]
    assert final.choices[0].finish_reason == "tool_calls"
    await split.idle()


async def test_functions_are_called_the_former_way(split: Split, tokenizer: Tokenizer) -> None:
    answers(split, tokenizer, '{"a": 1}')
    asked: Any = {
        "model": "default",
        "messages": [{"role": "user", "content": "x"}],
        "functions": [{"name": "g", "parameters": {"type": "object"}}],
        "function_call": {"name": "g"},
    }
    (choice,) = (await split.front.openai.chat.completions.create(**asked)).choices
    called = choice.message.function_call
    assert called is not None
    assert (called.name, called.arguments) == ("g", '{"a": 1}')
    assert (choice.finish_reason, choice.message.tool_calls) == ("function_call", None)
    stream = await split.front.openai.chat.completions.create(**asked, stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    pieces = [chunk.delta.function_call for chunk in chunks if chunk.delta.function_call is not None]
    assert [piece.name for piece in pieces if piece.name] == ["g"]
    assert "".join(piece.arguments or "" for piece in pieces) == '{"a": 1}'
    assert chunks[-1].finish_reason == "function_call"
    await split.idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_named_call(split: Split, tokenizer: Tokenizer, stream: bool) -> None:
    answers(split, tokenizer, '{"a": 1}')
    choice = {"type": "function", "function": {"name": "g"}}
    response = await split.front.chat(tools=TOOLS, tool_choice=choice, stream=stream, logprobs=True)
    if stream:
        pieces = [
            call
            for chunk in chunks_of(response.text)
            for call in chunk["choices"][0]["delta"].get("tool_calls", [])
        ]
        assert (pieces[0]["function"]["name"], pieces[0]["type"]) == ("g", "function")
        assert "".join(piece["function"]["arguments"] for piece in pieces) == '{"a": 1}'
    else:
        message = response.json()["choices"][0]["message"]
        assert message["tool_calls"][0]["function"] == {"name": "g", "arguments": '{"a": 1}'}
    await split.idle()


async def test_a_constraint_the_engine_cannot_keep(split: Split) -> None:
    split.prefill.failure = split.decode.failure = Error(
        code=ErrorCode.ERROR_CODE_UNSUPPORTED, message="cannot", param="constraint"
    )
    response = await split.front.chat(tools=TOOLS, tool_choice="required")
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", "tools")
    await split.idle()


async def test_a_conversation_with_calls_reaches_the_template(split: Split, tokenizer: Tokenizer) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny today"},
    ]
    response = await split.front.chat(messages=messages, tools=TOOLS, kvmesh={"returns_in_s": 5})
    assert response.status_code == 200
    # The next call's result is to come.
    assert split.front.router.requests[-1].hint == ReturnHint(tool_call=True, returns_in_s=5)
    text = tokenizer.decode(list(split.decode.received[0].token_ids), skip_special_tokens=False)
    assert "sunny today" in text
    await split.idle()


async def test_the_answer_goes_on_with_the_last_message(split: Split, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "The capital"}]
    wishes: list[dict[str, Any]] = [{"continue_final_message": True}, {"add_generation_prompt": False}]
    for fields in wishes:
        await split.front.chat(messages=messages, **fields)
    texts = [
        tokenizer.decode(list(request.token_ids), skip_special_tokens=False)
        for request in split.decode.received
    ]
    assert texts[0].endswith("The capital")
    assert texts[1].rstrip().endswith("<|im_end|>")
    await split.idle()


async def test_priority_and_session_reach_the_router(split: Split) -> None:
    response = await split.front.chat(service_tier="priority", safety_identifier="me")
    route = split.front.router.requests[-1]
    assert (route.priority, route.session_id) == (5, "me")
    asked = {"model": MODEL, "input": "hello", "session": "mine", "prompt_cache_key": "key"}
    assert (await split.front.http.post("/v1/responses", json=asked)).status_code == 200
    assert split.front.router.requests[-1].session_id == "mine"
    await split.front.chat(session="mine", kvmesh={"session_id": "first"})
    assert split.front.router.requests[-1].session_id == "first"
    assert response.json()["service_tier"] == "priority"
    assert split.decode.received[0].priority == 5
    assert (await split.front.chat()).json()["service_tier"] == "default"


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "f", "parameters": SCHEMA, "strict": True}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": hello(tools=[{"type": "function", "function": FUNCTION}]),
    "/v1/responses": {"model": MODEL, "input": "hello", "tools": [{"type": "function", **FUNCTION}]},
    "/v1/messages": hello(
        max_tokens=99,
        tools=[{"name": "f", "input_schema": SCHEMA, "strict": True}, {"name": "g", "input_schema": {}}],
    ),
}


@pytest.mark.parametrize("path", ASKED)
async def test_strict_functions_are_called_by_their_schemas(serve: Serve, path: str) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"city": "Paris"}}\n</tool_call>'
    async with serve(call, "qwen") as split:
        response = await split.front.http.post(path, json=ASKED[path])
        assert "Paris" in response.text
        assert "<tool_call>" not in response.text
        assert "x-kvmesh-ignored-params" not in response.headers
        tag = json.loads(split.decode.received[0].sampling.constraint.structural_tag)
        assert tag["structures"][0]["schema"] == SCHEMA


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("why", ["format", "workers"])
async def test_strict_is_named_where_it_is_not_kept(serve: Serve, path: str, why: str) -> None:
    template = "mistral" if why == "format" else "qwen"
    able = [CAPABILITY_GENERATE, CAPABILITY_CONSTRAIN][: 2 if why == "format" else 1]
    async with serve("hello", template, capabilities=able) as split:
        response = await split.front.http.post(path, json=ASKED[path])
        assert response.status_code == 200, response.text
        assert response.headers["x-kvmesh-ignored-params"] == "strict"
        assert not split.decode.received[0].sampling.HasField("constraint")


async def test_a_deadline_reaches_the_router(split: Split) -> None:
    await split.front.chat(kvmesh={"deadline_ms": 20_000})
    await split.front.chat()
    within, without = (route.deadline_ms for route in split.front.router.requests)
    # What is left of it; else of the request's own time.
    assert 10_000 < within <= 20_000 < without
    refused = await split.front.chat(kvmesh={"deadline_ms": 0})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "kvmesh.deadline_ms")
