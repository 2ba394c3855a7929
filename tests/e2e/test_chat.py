"""OpenAI's clients against real engines, the prompt computed by one and the answer by another."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from fixtures.mesh import Mesh

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

QUESTION: Any = [{"role": "user", "content": "Which city is the capital of France?"}]
MODEL = "default"


class City(BaseModel):
    name: Literal["Paris", "Rome", "Oslo"]
    districts: int = Field(ge=1, le=99)


class Weather(BaseModel):
    """Look the weather up."""

    city: Literal["Paris", "Rome"]
    unit: Literal["celsius", "fahrenheit"]


def tool(model: type[BaseModel]) -> Any:
    return openai.pydantic_function_tool(model)


def client(mesh: Mesh) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0, timeout=120)


def async_client(mesh: Mesh) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_parse_gives_a_model_of_ours(split_mesh: Mesh) -> None:
    with client(split_mesh) as openai_:
        answer = openai_.chat.completions.parse(
            model=MODEL, messages=QUESTION, response_format=City, temperature=0, max_tokens=60
        )
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, City)
    assert answer.choices[0].finish_reason == "stop"


async def test_every_constrained_answer_is_valid(split_mesh: Mesh) -> None:
    """At temperatures that no small model keeps its form at by itself."""
    async with async_client(split_mesh) as openai_:
        answers = await asyncio.gather(
            *(
                openai_.chat.completions.parse(
                    model=MODEL,
                    messages=QUESTION,
                    response_format=City,
                    temperature=1.8,
                    seed=seed,
                    max_tokens=60,
                )
                for seed in range(8)
            ),
            openai_.chat.completions.create(
                model=MODEL,
                messages=QUESTION,
                max_tokens=20,
                extra_body={"structured_outputs": {"choice": ["Paris!", "Oslo\n"]}},
            ),
        )
    assert all(isinstance(answer.choices[0].message.parsed, City) for answer in answers[:-1])  # type: ignore[union-attr]
    assert answers[-1].choices[0].message.content in ("Paris!", "Oslo\n")


async def test_streaming_helper_with_required_tools(split_mesh: Mesh) -> None:
    async with (
        async_client(split_mesh) as openai_,
        openai_.chat.completions.stream(
            model=MODEL,
            messages=QUESTION,
            tools=[tool(Weather), tool(City)],
            tool_choice="required",
            parallel_tool_calls=False,
            temperature=1.5,
            seed=3,
            max_tokens=80,
        ) as stream,
    ):
        final = await stream.get_final_completion()
    choice = final.choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather | City)


def test_a_conversation_goes_through_a_tool(split_mesh: Mesh) -> None:
    with client(split_mesh) as openai_:
        first = openai_.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            tools=[tool(Weather)],
            tool_choice={"type": "function", "function": {"name": "Weather"}},
            temperature=0,
            max_tokens=60,
        )
        (call,) = first.choices[0].message.tool_calls or []
        assert call.type == "function"
        Weather.model_validate_json(call.function.arguments)
        second = openai_.chat.completions.create(
            model=MODEL,
            messages=[
                *QUESTION,
                first.choices[0].message.to_dict(),  # type: ignore[list-item]
                {"role": "tool", "tool_call_id": call.id, "content": "It is sunny."},
            ],
            tools=[tool(Weather)],
            temperature=0,
            max_tokens=12,
        )
    assert second.choices[0].message.content


async def test_four_choices_equal_four_seeds(split_mesh: Mesh) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "messages": QUESTION,
        "temperature": 0.8,
        "max_tokens": 8,
    }
    async with async_client(split_mesh) as openai_:
        together = await openai_.chat.completions.create(**request, n=4, seed=21)
        alone = [await openai_.chat.completions.create(**request, seed=21 + i) for i in range(4)]
    texts = [choice.message.content for choice in together.choices]
    assert texts == [one.choices[0].message.content for one in alone]
    assert len(set(texts)) > 1
    assert together.usage is not None
    assert together.usage.prompt_tokens == alone[0].usage.prompt_tokens  # type: ignore[union-attr]


async def test_log_probabilities_equal_the_aggregated_engines(
    split_mesh: Mesh, aggregated_mesh: Mesh
) -> None:
    body = {
        "model": MODEL,
        "prompt": [5_000 + 7 * i for i in range(60)],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": 3,
        "echo": True,
    }
    async with httpx.AsyncClient(timeout=120) as http:
        answers = await asyncio.gather(
            *(http.post(f"{mesh.url}/v1/completions", json=body) for mesh in (split_mesh, aggregated_mesh))
        )
    split, whole = (answer.json()["choices"][0] for answer in answers)
    assert split["text"] == whole["text"]
    assert split["logprobs"]["tokens"] == whole["logprobs"]["tokens"]
    assert len(split["logprobs"]["tokens"]) >= 67
    values = split["logprobs"]["token_logprobs"]
    assert values[0] is None
    assert values[1:] == pytest.approx(whole["logprobs"]["token_logprobs"][1:], abs=1e-2)
    for one, other in zip(split["logprobs"]["top_logprobs"], whole["logprobs"]["top_logprobs"], strict=True):
        assert one == (other and pytest.approx(other, abs=1e-2))


def test_chat_log_probabilities_spell_the_answer(split_mesh: Mesh) -> None:
    with client(split_mesh) as openai_:
        answer = openai_.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=10, logprobs=True, top_logprobs=2
        )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert b"".join(bytes(one.bytes or ()) for one in content).decode() == choice.message.content
    assert all(one.top_logprobs[0].token == one.token for one in content)


def test_a_schema_that_cannot_be_compiled_is_the_clients_fault(split_mesh: Mesh) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "city"}}}
    with client(split_mesh) as openai_, pytest.raises(openai.BadRequestError) as caught:
        openai_.chat.completions.create(model=MODEL, messages=QUESTION, response_format=bad)  # type: ignore[call-overload]
    assert caught.value.param == "response_format.json_schema.schema"
    assert "city" in caught.value.message
    answer = split_mesh.chat("Say yes.", response_format={"type": "json_object"}, max_tokens=1)
    assert answer["choices"][0]["finish_reason"] == "length"


def test_anthropics_client_gets_a_call(split_mesh: Mesh) -> None:
    wanted: Any = {"name": "Weather", "input_schema": Weather.model_json_schema()}
    with (
        anthropic.Anthropic(base_url=split_mesh.url, api_key="none", max_retries=0, timeout=120) as client,
        client.messages.stream(
            model=MODEL,
            max_tokens=60,
            messages=QUESTION,
            tools=[wanted],
            tool_choice={"type": "tool", "name": "Weather"},
        ) as stream,
    ):
        message = stream.get_final_message()
    (block,) = message.content
    assert block.type == "tool_use"
    assert message.stop_reason == "tool_use"
    Weather.model_validate(block.input)


def test_a_response_goes_through_a_tool(split_mesh: Mesh) -> None:
    wanted: Any = {
        "type": "function",
        "name": "Weather",
        "parameters": Weather.model_json_schema(),
        "strict": True,
    }
    with client(split_mesh) as openai_:
        # One: the model picks as it likes, and a second call may not fit.
        with openai_.responses.stream(
            model=MODEL,
            input=QUESTION,
            tools=[wanted],
            tool_choice="required",
            parallel_tool_calls=False,
            max_output_tokens=80,
        ) as stream:
            first = stream.get_final_response()
        call = first.output[0]
        assert call.type == "function_call"
        Weather.model_validate_json(call.arguments)
        second = openai_.responses.parse(
            model=MODEL,
            previous_response_id=first.id,
            input=[{"type": "function_call_output", "call_id": call.call_id, "output": "It is sunny."}],
            text_format=City,
            max_output_tokens=60,
        )
    assert isinstance(second.output_parsed, City)
