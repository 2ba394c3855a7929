"""OpenAI's client for responses against a frontend with scripted workers."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from tokenizers import Tokenizer

from fixtures.frontend import ANSWER, EOS, MODEL, Split, endless, error_of
from fixtures.waiting import eventually
from kvmesh.v1.errors_pb2 import Error, ErrorCode

TOOLS: Any = [
    {"type": "function", "name": name, "parameters": {"type": "object"}, "strict": True}
    for name in ("f", "g")
]
CALLS = [{"name": "f", "arguments": {"city": "Paris é"}}, {"name": "g", "arguments": {}}]


class City(BaseModel):
    name: Literal["Paris"]


def answers(split: Split, tokenizer: Tokenizer, text: str) -> None:
    ids = [*tokenizer.encode(text, add_special_tokens=False).ids, EOS]
    split.prefill.script = split.decode.script = lambda _: ids


def prompt(split: Split, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(list(split.decode.received[-1].token_ids), skip_special_tokens=False)


async def events(split: Split, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "input": "hello", "stream": True, **fields}
    response = await split.front.http.post("/v1/responses", json=body)
    found = []
    for event in response.text.split("\n\n")[:-1]:
        name, data = event.split("\ndata: ")
        found.append(json.loads(data))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


async def test_a_response(split: Split, tokenizer: Tokenizer) -> None:
    client: Any = split.front.openai
    response = await client.responses.create(
        model="default",
        input="hello",
        instructions="Be brief.",
        max_output_tokens=50,
        metadata={"a": "b"},
        top_logprobs=1,
    )
    assert response.output_text == ANSWER
    assert (response.status, response.model, response.metadata) == ("completed", MODEL, {"a": "b"})
    assert "Be brief." in prompt(split, tokenizer)
    sent = split.decode.received[0]
    assert sent.sampling.max_new_tokens == 50
    assert response.usage is not None
    assert response.usage.input_tokens == len(sent.token_ids)
    assert response.usage.input_tokens_details.cached_tokens == 16
    part = response.output[0].content[0]
    assert part.logprobs
    assert await client.responses.retrieve(response.id) == response
    counted = await client.responses.input_tokens.count(
        model="default", input="hello", instructions="Be brief."
    )
    assert counted.input_tokens == len(sent.token_ids)
    await split.idle()


async def test_events_come_in_order(split: Split) -> None:
    found = await events(split)
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert "".join(event["delta"] for event in found[4:-4]) == ANSWER
    assert found[0]["response"]["output"] == []
    streaming: Any = split.front.openai.responses
    async with streaming.stream(model=MODEL, input="hello") as stream:
        assert (await stream.get_final_response()).output_text == ANSWER
    await split.idle()


async def test_all_that_was_asked_is_said_from_the_first_event_on(split: Split) -> None:
    found = await events(split, tools=[{"type": "function", "name": "f"}])
    for response in (found[0]["response"], found[-1]["response"]):
        # What typed clients, those of Open Responses among them, take for granted is there, be it null.
        assert (response["temperature"], response["top_p"]) == (1.0, 1.0)
        assert (response["presence_penalty"], response["frequency_penalty"]) == (0.0, 0.0)
        assert response["user"] is None
        tool = {"type": "function", "name": "f", "description": None, "parameters": None, "strict": None}
        assert response["tools"] == [tool]
    assert found[0]["response"]["usage"] is None
    assert found[-1]["response"]["usage"]["output_tokens"] > 0
    asked = await events(split, temperature=0.0, top_p=0.5, user="me")
    said = asked[0]["response"]
    assert (said["temperature"], said["top_p"], said["user"]) == (0.0, 0.5, "me")


async def test_items_are_named_instead_of_given(split: Split, tokenizer: Tokenizer) -> None:
    client: Any = split.front.openai
    first = await client.responses.create(model=MODEL, input="one")
    (asked,) = (await client.responses.input_items.list(first.id)).data
    named = [{"type": "item_reference", "id": asked.id}, {"id": first.output[0].id}]
    last = {"role": "user", "content": "two"}
    second = await client.responses.create(model=MODEL, input=[*named, last])
    text = prompt(split, tokenizer)
    assert text.index("one") < text.index(ANSWER) < text.index("two")
    # They are the second's own input from then on.
    await client.responses.delete(first.id)
    items = (await client.responses.input_items.list(second.id, order="asc")).data
    assert [item.id for item in items[:2]] == [asked.id, first.output[0].id]
    await client.responses.create(model=MODEL, input=[*named, last])
    assert prompt(split, tokenizer) == text
    away = await client.responses.create(model=MODEL, input="x", store=False)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.responses.create(model=MODEL, input=[last, {"id": away.output[0].id}])
    assert caught.value.param == "input[1].id"
    await split.idle()


async def test_calls_and_their_outputs(split: Split, tokenizer: Tokenizer) -> None:
    answers(split, tokenizer, json.dumps(CALLS))
    client: Any = split.front.openai
    first = await client.responses.create(model=MODEL, input="x", tools=TOOLS, tool_choice="required")
    assert [(item.name, json.loads(item.arguments)) for item in first.output] == [
        (call["name"], call["arguments"]) for call in CALLS
    ]
    found = await events(split, tools=TOOLS, tool_choice="required", store=False)
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds.count("output_item.added") == kinds.count("output_item.done") == 2
    assert kinds.count("function_call_arguments.done") == 2
    outputs: Any = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"} for item in first.output
    ]
    await client.responses.create(
        model=MODEL,
        previous_response_id=first.id,
        input=outputs,
        tools=TOOLS,
        tool_choice={"type": "function", "name": "g"},
    )
    assert prompt(split, tokenizer).count("sunny") == 2
    assert json.loads(split.decode.received[-1].sampling.constraint.json_schema) == {"type": "object"}
    await split.idle()


async def test_parse_gives_a_model_of_ours(split: Split, tokenizer: Tokenizer) -> None:
    answers(split, tokenizer, '{"name":"Paris"}')
    client: Any = split.front.openai
    parsed = await client.responses.parse(model=MODEL, input="x", text_format=City)
    assert parsed.output_parsed == City(name="Paris")
    split.prefill.failure = split.decode.failure = Error(
        code=ErrorCode.ERROR_CODE_INVALID_ARGUMENT, message="cannot compile", param="constraint"
    )
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.parse(model=MODEL, input="x", text_format=City)
    assert caught.value.param == "text.format.schema"
    await split.idle()


async def test_a_conversation_is_kept_and_forgotten(split: Split, tokenizer: Tokenizer) -> None:
    client: Any = split.front.openai
    first = await client.responses.create(model=MODEL, input="one", instructions="Be brief.")
    second = await client.responses.create(
        model=MODEL,
        previous_response_id=first.id,
        input=[{"role": "user", "content": [{"type": "input_text", "text": "two"}]}],
    )
    text = prompt(split, tokenizer)
    assert text.index("one") < text.index(ANSWER) < text.index("two")
    assert "Be brief." not in text
    items = await client.responses.input_items.list(second.id, order="asc")
    assert [item.content[0].text for item in items.data] == ["two"]
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.responses.create(model=MODEL, previous_response_id=second.id, input="three")
    assert caught.value.param == "previous_response_id"
    away = await client.responses.create(model=MODEL, input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(away.id)


async def test_in_the_background(split: Split) -> None:
    client: Any = split.front.openai
    split.decode.stall.clear()
    split.prefill.stall.clear()
    run = await client.responses.create(model=MODEL, input="x", background=True)
    assert run.status == "queued"
    with pytest.raises(openai.BadRequestError):
        await client.responses.create(model=MODEL, previous_response_id=run.id, input="y")
    follower = await client.responses.retrieve(run.id, stream=True, starting_after=0)
    split.decode.stall.set()
    split.prefill.stall.set()
    followed = [event async for event in follower]
    assert followed[0].type == "response.queued"
    assert followed[-1].type == "response.completed"
    assert (await client.responses.retrieve(run.id)).output_text == ANSWER
    assert (await client.responses.cancel(run.id)).status == "completed"
    await split.idle()


async def test_cancelled_in_the_background(split: Split) -> None:
    client: Any = split.front.openai
    split.prefill.script = split.decode.script = endless
    split.decode.step_s = 0.02
    stream = await client.responses.create(model=MODEL, input="x", background=True, stream=True)
    seen = [await anext(stream) for _ in range(8)]
    # A listener who leaves ends nothing.
    await stream.close()
    id = seen[0].response.id
    assert (await client.responses.retrieve(id)).status == "in_progress"
    cancelled = await client.responses.cancel(id)
    assert (cancelled.status, cancelled.output[0].status) == ("cancelled", "incomplete")
    assert cancelled.output_text
    await split.idle()
    other = await client.responses.create(model=MODEL, input="x", background=True)
    await client.responses.delete(other.id)
    await split.idle()
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(other.id)


async def test_why_it_ended(split: Split) -> None:
    client: Any = split.front.openai
    split.prefill.script = split.decode.script = endless
    short = await client.responses.create(model=MODEL, input="x", max_output_tokens=4)
    assert short.status == "incomplete"
    assert short.incomplete_details is not None
    assert short.incomplete_details.reason == "max_output_tokens"
    gone = Error(code=ErrorCode.ERROR_CODE_ENGINE_FAILED, message="gone")
    split.fail_decoding(gone, 3)
    found = await events(split)
    assert found[-1]["type"] == "response.failed"
    assert found[-1]["response"]["error"] == {"code": "server_error", "message": "gone"}
    kept = await client.responses.retrieve(found[-1]["response"]["id"])
    assert kept.status == "failed"
    with pytest.raises(openai.InternalServerError):
        await client.responses.create(model=MODEL, input="x")
    run = await client.responses.create(model=MODEL, input="x", background=True)
    await eventually(lambda: split.front.gateway.runs.find("", run.id) is None, 10, "the run to end")
    assert (await client.responses.retrieve(run.id)).status == "failed"
    await split.idle()


async def test_truncation_leaves_out_the_oldest(split: Split, tokenizer: Tokenizer) -> None:
    turns: Any = [{"role": "user", "content": f"turn {i} " + "word " * 150} for i in range(6)]
    wanted: Any = {"model": MODEL, "instructions": "Be brief.", "input": turns}
    with pytest.raises(openai.BadRequestError) as caught:
        await split.front.openai.responses.create(**wanted)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    await split.front.openai.responses.create(**wanted, truncation="auto")
    text = prompt(split, tokenizer)
    assert "Be brief." in text
    assert [i for i in range(6) if f"turn {i}" in text] == [3, 4, 5]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference"}]}, "input[0].id"),
        ({"input": [{"id": "msg_x"}] * 1_025}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"include": ["everything"]}, "include"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True, "store": False}, "background"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
async def test_bad_bodies(split: Split, fields: dict[str, Any], param: str) -> None:
    response = await split.front.http.post("/v1/responses", json={"model": MODEL, "input": "x", **fields})
    assert error_of(response)["param"] == param
    assert not split.decode.received
    await split.idle()


async def test_bad_questions_about_stored_responses(split: Split) -> None:
    client: Any = split.front.openai
    kept = await client.responses.create(model=MODEL, input="x")
    for path in ("?stream=true", "/input_items?limit=0", "/input_items?after=msg_x"):
        assert (await split.front.http.get(f"/v1/responses/{kept.id}{path}")).status_code == 400
    with pytest.raises(openai.BadRequestError):
        await client.responses.cancel(kept.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.input_items.list("resp_none")


async def compact(split: Split, **fields: Any) -> dict[str, Any]:
    # The client that is pinned does not know it yet.
    response = await split.front.http.post("/v1/responses/compact", json={"model": MODEL, **fields})
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_conversation_is_made_shorter_and_goes_on(split: Split, tokenizer: Tokenizer) -> None:
    client: Any = split.front.openai
    first = await client.responses.create(model=MODEL, input="one", instructions="Be brief.")
    short = await compact(split, previous_response_id=first.id, input="two", instructions="Be kind.")
    text = prompt(split, tokenizer)
    assert "Be kind." in text
    assert text.index("one") < text.index(ANSWER) < text.index("two")
    *said, notes = short["output"]
    assert [item["content"][0]["text"] for item in said] == ["one", "two"]
    assert (short["object"], notes["type"]) == ("response.compaction", "compaction")
    assert short["usage"]["output_tokens"] > 0
    await client.responses.create(model=MODEL, input=[*short["output"], {"role": "user", "content": "three"}])
    text = prompt(split, tokenizer)
    # What the model has noted stands where its answers stood.
    assert text.index("two") < text.index(ANSWER) < text.index("three")
    assert text.count(ANSWER) == 1
    # The oldest turns of one that is too long are not summed up.
    await compact(split, input=[{"role": "user", "content": "word " * 60}] * 20)
    assert len(split.decode.received[-1].token_ids) <= 384
    item = {"type": "compaction", "encrypted_content": "x"}
    response = await split.front.http.post("/v1/responses", json={"model": MODEL, "input": [item]})
    assert error_of(response)["param"] == "input[0].encrypted_content"
    await split.idle()
