"""What a model thinks, as Anthropic's blocks and OpenAI's items, and given back with the conversation."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest
from tokenizers import Tokenizer

from fixtures.frontend import Serve, Split
from fixtures.text import TOOLS

THOUGHT = "The user wants 🗼."
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Tōkyō"}}\n</tool_call>'
ANSWER = f"<think>\n{THOUGHT}\n</think>\n\nLet me see.\n{CALL}"
HELLO: Any = [{"role": "user", "content": "hello"}]
ENABLED: Any = {"type": "enabled", "budget_tokens": 1024}
MESSAGES_TOOLS: Any = [
    {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]}  # type: ignore[index]
    for tool in TOOLS
]
RESPONSES_TOOLS: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]


def prompt(split: Split, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(list(split.decode.received[-1].token_ids), skip_special_tokens=False)


async def message_of(split: Split, *, stream: bool = False, **fields: Any) -> Any:
    asked: Any = {"model": "default", "max_tokens": 200, "messages": HELLO, "tools": MESSAGES_TOOLS, **fields}
    async with anthropic.AsyncAnthropic(base_url=split.front.url, api_key="none", max_retries=0) as client:
        if not stream:
            return await client.messages.create(**asked)
        async with client.messages.stream(**asked) as events:
            return await events.get_final_message()


async def events_of(split: Split, path: str, **body: Any) -> list[dict[str, Any]]:
    response = await split.front.http.post(path, json={"model": "default", "stream": True, **body})
    return [json.loads(event.split("data: ")[1]) for event in response.text.split("\n\n")[:-1]]


@pytest.mark.parametrize("stream", [False, True])
async def test_thinking_blocks_come_first_and_go_back(
    serve: Serve, tokenizer: Tokenizer, stream: bool
) -> None:
    async with serve(ANSWER) as split:
        message = await message_of(split, stream=stream, thinking=ENABLED)
        thinking, text, call = message.content
        assert (thinking.type, text.type, call.type) == ("thinking", "text", "tool_use")
        assert (thinking.thinking, text.text, call.input) == (THOUGHT, "Let me see.", {"city": "Tōkyō"})
        assert thinking.signature
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        more: Any = [
            *HELLO,
            {"role": "assistant", "content": message.content},
            {"role": "user", "content": [result]},
        ]
        await message_of(split, messages=more, thinking=ENABLED)
        # As the model wrote it.
        assert ANSWER in prompt(split, tokenizer)


async def test_the_events_of_a_thinking_block(serve: Serve) -> None:
    async with serve(ANSWER) as split:
        events = await events_of(split, "/v1/messages", max_tokens=200, messages=HELLO, thinking=ENABLED)
    own = [event for event in events if event.get("index") == 0]
    assert own[0]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    kinds = [event["delta"]["type"] for event in own[1:-1]]
    assert set(kinds[:-1]) == {"thinking_delta"}
    assert kinds[-1] == "signature_delta"
    assert "".join(event["delta"]["thinking"] for event in own[1:-2]) == THOUGHT
    assert own[-1]["type"] == "content_block_stop"


@pytest.mark.parametrize("thinking", [None, {"type": "disabled"}])
async def test_who_has_not_asked_sees_no_thinking(serve: Serve, thinking: Any) -> None:
    async with serve(ANSWER) as split:
        message = await message_of(split, **({"thinking": thinking} if thinking else {}))
        assert [block.type for block in message.content] == ["text", "tool_use"]


async def test_thinking_that_is_not_displayed_comes_back_by_its_signature(
    serve: Serve, tokenizer: Tokenizer
) -> None:
    async with serve(f"<think>\n{THOUGHT}\n</think>\n\nYes.") as split:
        message = await message_of(split, thinking={"type": "adaptive", "display": "omitted"})
        thinking = message.content[0]
        assert thinking.type == "thinking"
        assert thinking.thinking == ""
        begun: Any = [*HELLO, {"role": "assistant", "content": message.content}]
        await message_of(split, messages=[*begun, *HELLO])
        assert "Yes." in prompt(split, tokenizer)
        # The template shows the thoughts of the last turn alone.
        await message_of(split, messages=begun)
        assert THOUGHT in prompt(split, tokenizer)
        for signature in ("", "x", "é", "a3ZtZXNoMTp4"):
            begun[-1]["content"] = [{"type": "thinking", "thinking": "", "signature": signature}]
            await message_of(split, messages=[*begun, *HELLO])


async def test_a_response_with_reasoning_goes_on(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(ANSWER) as split:
        client: Any = split.front.openai
        first = await client.responses.create(model="default", input=HELLO, tools=RESPONSES_TOOLS)
        reasoning, message, call = first.output
        assert (reasoning.type, message.type, call.type) == ("reasoning", "message", "function_call")
        assert [part.text for part in reasoning.content] == [THOUGHT]
        assert (reasoning.summary, reasoning.status) == ([], "completed")
        assert first.output_text == "Let me see."
        assert first.usage.output_tokens_details.reasoning_tokens > 0
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        await client.responses.create(
            model="default", previous_response_id=first.id, input=[output], tools=RESPONSES_TOOLS
        )
        stored = prompt(split, tokenizer)
        assert ANSWER in stored
        # The same, carried by the client.
        await client.responses.create(
            model="default", input=[*HELLO, *first.output, output], tools=RESPONSES_TOOLS, store=False
        )
        assert prompt(split, tokenizer) == stored
        listed = await client.responses.input_items.list((await client.responses.retrieve(first.id)).id)
        assert [item.type for item in listed.data] == ["message"]


async def test_sealed_reasoning_is_enough(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(ANSWER) as split:
        client: Any = split.front.openai
        asked = {"model": "default", "tools": RESPONSES_TOOLS, "store": False}
        first = await client.responses.create(
            **asked, input=HELLO, include=["reasoning.encrypted_content"], top_logprobs=1
        )
        reasoning, message, call = (item.to_dict() for item in first.output)
        del reasoning["content"]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
        await client.responses.create(**asked, input=[*HELLO, reasoning, message, call, output])
        assert ANSWER in prompt(split, tokenizer)


async def test_the_events_of_a_reasoning_item(serve: Serve) -> None:
    async with serve(ANSWER) as split:
        events = await events_of(split, "/v1/responses", input="hello", top_logprobs=1)
        final = events[-1]["response"]
        async with split.front.openai.responses.stream(model="default", input="hello") as stream:
            helped = await stream.get_final_response()
    own = [event for event in events if event.get("output_index") == 0]
    kinds = [event["type"].removeprefix("response.") for event in own]
    assert kinds[:2] == ["output_item.added", "content_part.added"]
    assert set(kinds[2:-3]) == {"reasoning_text.delta"}
    assert kinds[-3:] == ["reasoning_text.done", "content_part.done", "output_item.done"]
    assert own[0]["item"]["type"] == "reasoning"
    assert own[1]["part"] == {"type": "reasoning_text", "text": ""}
    assert "".join(event["delta"] for event in own[2:-3]) == own[-3]["text"] == THOUGHT
    assert [item["type"] for item in final["output"]] == ["reasoning", "message"]
    assert [item.type for item in helped.output] == ["reasoning", "message"]


async def test_reasoning_that_length_cuts(serve: Serve) -> None:
    async with serve(ANSWER) as split:
        client: Any = split.front.openai
        response = await client.responses.create(model="default", input="hello", max_output_tokens=5)
        (item,) = response.output
        assert (response.status, item.type, item.status) == ("incomplete", "reasoning", "incomplete")
        message = await message_of(split, max_tokens=5, thinking=ENABLED)
        assert ([block.type for block in message.content], message.stop_reason) == (
            ["thinking"],
            "max_tokens",
        )
