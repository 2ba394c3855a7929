"""Tool calls and reasoning in answers that models write as they like, before workers that tests script."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from fixtures.frontend import Serve, Split, chunks_of, endless
from fixtures.text import TOOLS
from kvmesh.frontend.models import Model
from kvmesh.v1.frontend_pb2 import ChatMessage, ChatRequest, Tool

CALLS = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Tōkyō"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
THOUGHT = "<think>\nThe user wants 🗼.\n</think>\n\n"
ANSWER = THOUGHT + "Let me see.\n" + CALLS


def the_only_model(split: Split) -> Model:
    (model,) = split.front.models.usable()
    return model


async def choice_of(split: Split, **fields: Any) -> dict[str, Any]:
    response = await split.front.chat(**fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def called(message: dict[str, Any]) -> list[tuple[str, str]]:
    calls = message.get("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


EXPECTED = [("weather", '{"city": "Tōkyō"}'), ("time", "{}")]


@pytest.mark.parametrize("choice", [None, "auto", {"type": "allowed_tools", "allowed_tools": ...}])
async def test_calls_of_the_models_own(serve: Serve, tokenizer: Tokenizer, choice: Any) -> None:
    if isinstance(choice, dict):
        choice = {**choice, "allowed_tools": {"mode": "auto", "tools": TOOLS}}
    async with serve(ANSWER) as split:
        response = await split.front.chat(tools=TOOLS, tool_choice=choice)
        answer = response.json()
        assert not split.decode.received[0].sampling.HasField("constraint")
    message = answer["choices"][0]["message"]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning_content"]) == ("Let me see.", "The user wants 🗼.")
    assert called(message) == EXPECTED
    thought = len(tokenizer.encode(THOUGHT, add_special_tokens=False).ids)
    assert 0 < answer["usage"]["completion_tokens_details"]["reasoning_tokens"] <= thought


async def test_streamed(serve: Serve) -> None:
    # The client's own helper takes no others.
    strict = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]  # type: ignore[dict-item]
    async with (
        serve(ANSWER) as split,
        split.front.openai.chat.completions.stream(
            model="default",
            messages=[{"role": "user", "content": "x"}],
            tools=strict,  # type: ignore[arg-type]
            stream_options={"include_usage": True},
        ) as stream,
    ):
        deltas = [
            event.chunk.choices[0].delta
            async for event in stream
            if event.type == "chunk" and event.chunk.choices
        ]
        final = await stream.get_final_completion()
    choice = final.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls = choice.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == EXPECTED
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "The user wants 🗼."
    # Steps may come together, but reasoning always comes first.
    thought = [i for i, delta in enumerate(deltas) if hasattr(delta, "reasoning_content")]
    assert max(thought) < min(i for i, delta in enumerate(deltas) if delta.tool_calls)
    assert final.usage is not None
    assert final.usage.completion_tokens_details is not None
    assert final.usage.completion_tokens_details.reasoning_tokens


async def test_grpc(serve: Serve) -> None:
    request = ChatRequest(
        model="default",
        messages=[ChatMessage(role="user", content="x")],
        tools=[Tool(name="weather"), Tool(name="time")],
    )
    async with serve(ANSWER) as split:
        responses = [response async for response in split.front.grpc.Chat(request)]
    assert "".join(r.reasoning for r in responses) == "The user wants 🗼."
    assert "".join(r.text for r in responses) == "Let me see."
    names = [call.name for r in responses for call in r.tool_calls if call.id]
    assert names == ["weather", "time"]
    assert responses[-1].finish_reason == "tool_calls"
    assert responses[-1].usage.reasoning_tokens


async def test_what_nobody_offered_is_text(serve: Serve) -> None:
    async with serve(CALLS) as split:
        for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            choice = await choice_of(split, **fields)
            assert (choice["message"]["content"], choice["finish_reason"]) == (CALLS, "stop")
        only = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": TOOLS[1:]}}
        choice = await choice_of(split, tools=TOOLS, tool_choice=only)
        assert called(choice["message"]) == EXPECTED[1:]
        assert '"weather"' in choice["message"]["content"]


async def test_a_call_cut_by_length(serve: Serve) -> None:
    async with serve(CALLS) as split:
        choice = await choice_of(split, tools=TOOLS, max_tokens=18)
    assert choice["finish_reason"] == "length"
    ((name, arguments),) = called(choice["message"])
    assert name == "weather"
    assert EXPECTED[0][1].startswith(arguments)


async def test_a_stop_string_ends_reasoning_and_calls(serve: Serve) -> None:
    async with serve(ANSWER) as split:
        choice = await choice_of(split, tools=TOOLS, stop="wants")
        assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("The user", "")
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_of_every_token(serve: Serve, tokenizer: Tokenizer, stream: bool) -> None:
    async with serve(ANSWER) as split:
        response = await split.front.chat(tools=TOOLS, logprobs=True, stream=stream)
    chunks = chunks_of(response.text) if stream else [response.json()]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    scored = [one for choice in choices for one in (choice["logprobs"] or {"content": []})["content"]]
    assert bytes(byte for one in scored for byte in one["bytes"]).decode() == ANSWER


async def test_reasoning_that_the_prompt_begins(serve: Serve) -> None:
    async with serve("The user\n</think>\n\nYes.", "r1") as split:
        message = (await choice_of(split))["message"]
        assert (message["reasoning_content"], message["content"]) == ("The user", "Yes.")
    async with serve('{"a": 1}', "r1") as split:
        # A constraint leaves no room for it.
        message = (await choice_of(split, response_format={"type": "json_object"}))["message"]
        assert message["content"] == '{"a": 1}'
        assert "reasoning_content" not in message
        choice = await choice_of(
            split, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "time"}}
        )
        assert called(choice["message"]) == [("time", '{"a": 1}')]


async def test_what_workers_say_comes_before_the_template(serve: Serve) -> None:
    async with serve(ANSWER, tool_format="none", reasoning_format="none") as split:
        choice = await choice_of(split, tools=TOOLS)
        assert (choice["message"]["content"], choice["finish_reason"]) == (ANSWER, "stop")
    async with serve(
        'x</think>{"name": "time", "parameters": {}}',
        tool_format="llama3_json",
        reasoning_format="deepseek-r1",
    ) as split:
        message = (await choice_of(split, tools=TOOLS))["message"]
        assert (message["reasoning_content"], called(message)) == ("x", [("time", "{}")])
        # The template has closed it, whatever the format's name says.
        message = (await choice_of(split, chat_template_kwargs={"enable_thinking": False}))["message"]
        assert "reasoning_content" not in message
    async with serve(ANSWER, tool_format="of-tomorrow") as split:
        assert the_only_model(split).tool_format is None
        assert (await choice_of(split, tools=TOOLS))["finish_reason"] == "stop"


async def test_calls_go_back_to_the_template_as_objects(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(ANSWER) as split:
        message = (await choice_of(split, tools=TOOLS))["message"]
        messages = [
            {"role": "user", "content": "x"},
            message,
            {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"},
        ]
        await choice_of(split, messages=messages, tools=TOOLS)
        prompt = tokenizer.decode(list(split.decode.received[-1].token_ids), skip_special_tokens=False)
    # As the model wrote it.
    assert ANSWER in prompt
    assert json.dumps({"city": "Tōkyō"}, ensure_ascii=False) in prompt


@pytest.mark.parametrize("stream", [False, True])
async def test_one_call_where_no_more_are_wanted(serve: Serve, stream: bool) -> None:
    async with serve(ANSWER) as split:
        split.decode.step_s = 0.001
        # After the second call the answer would go on for long.
        script = split.decode.script
        split.decode.script = lambda request: [*script(request)[:-1], *endless(request)]
        response = await split.front.chat(tools=TOOLS, parallel_tool_calls=False, stream=stream)
        await split.idle()
        assert split.decode.cancelled
    if stream:
        choices = [chunk["choices"][0] for chunk in chunks_of(response.text)]
        pieces = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
        assert {call["index"] for call in pieces} == {0}
        assert "".join(call["function"]["arguments"] for call in pieces) == EXPECTED[0][1]
        assert choices[-1]["finish_reason"] == "tool_calls"
    else:
        (choice,) = response.json()["choices"]
        assert (choice["message"]["content"], called(choice["message"])) == ("Let me see.", EXPECTED[:1])
        assert choice["finish_reason"] == "tool_calls"


async def test_a_template_gets_ids_that_it_takes(serve: Serve, tokenizer: Tokenizer) -> None:
    """Mistral's refuses all that are not nine letters and digits."""
    function = {"name": "time", "arguments": "{}"}
    calls = [{"id": id, "type": "function", "function": function} for id in ("call_" + "x" * 24, "abcDEF123")]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "noon"} for call in calls]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}, *results]
    async with serve("Noon.", "mistral") as split:
        choice = await choice_of(split, messages=messages, tools=TOOLS)
        assert choice["message"]["content"] == "Noon."
        prompt = tokenizer.decode(list(split.decode.received[-1].token_ids), skip_special_tokens=False)
    assert '"id": "abcDEF123"' in prompt
    assert "call_" not in prompt
