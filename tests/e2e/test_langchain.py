"""LangChain's client for OpenAI against real engines, over both of OpenAI's APIs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import httpx
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field, SecretStr

from fixtures.mesh import Mesh

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

QUESTION = "Which city is the capital of France?"


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome", "Oslo"]
    districts: int = Field(ge=1, le=99)


class Weather(BaseModel):
    """Look the weather up."""

    city: Literal["Paris", "Rome"]
    unit: Literal["celsius", "fahrenheit"]


def model(mesh: Mesh, http: httpx.Client | None = None, **fields: Any) -> ChatOpenAI:
    """`http`: else it keeps one of its own, open for ever."""
    key = SecretStr("none")
    asked: dict[str, Any] = {"temperature": 0, "max_completion_tokens": 60, "max_retries": 0, **fields}
    return ChatOpenAI(base_url=f"{mesh.url}/v1", api_key=key, model="default", http_client=http, **asked)


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=120) as client:
        yield client


async def test_streams_add_up_to_what_is_answered_whole(split_mesh: Mesh) -> None:
    async with httpx.AsyncClient(timeout=120) as http:
        chat = model(split_mesh, http_async_client=http)
        whole = await chat.ainvoke(QUESTION)
        chunks = [chunk async for chunk in chat.astream(QUESTION, stream_usage=True)]
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert whole.usage_metadata is not None
        (usage,) = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
        assert usage["output_tokens"] == whole.usage_metadata["output_tokens"] > 0
        two = model(split_mesh, n=2, seed=7, temperature=1, http_async_client=http)
        generated = await two.agenerate([[HumanMessage(QUESTION)]])
        assert len(generated.generations[0]) == 2


@pytest.mark.parametrize("responses", [False, True])
def test_a_conversation_goes_through_a_tool(split_mesh: Mesh, http: httpx.Client, responses: bool) -> None:
    chat = model(split_mesh, http, use_responses_api=responses)
    asked = HumanMessage(QUESTION)
    called = chat.bind_tools([Weather], tool_choice="Weather").invoke([asked])
    assert isinstance(called, AIMessage)
    (call,) = called.tool_calls
    Weather.model_validate(call["args"])
    result = ToolMessage("It is sunny.", tool_call_id=call["id"])
    said = chat.bind_tools([Weather], tool_choice="none").invoke([asked, called, result])
    assert said.text


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("responses", [False, True])
def test_structured_output(split_mesh: Mesh, http: httpx.Client, method: Any, responses: bool) -> None:
    chat = model(split_mesh, http, use_responses_api=responses)
    assert isinstance(chat.with_structured_output(City, method=method).invoke(QUESTION), City)


def test_completions(split_mesh: Mesh, http: httpx.Client) -> None:
    text = OpenAI(
        base_url=f"{split_mesh.url}/v1",
        api_key=SecretStr("none"),
        model="default",
        temperature=0,
        max_tokens=8,
        max_retries=0,
        http_client=http,
    )
    answers = text.generate(["The capital of France is", "One, two, three,"])
    assert all(one.text for (one,) in answers.generations)
