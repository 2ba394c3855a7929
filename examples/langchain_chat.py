"""LangChain's client: a stream, a tool and a structured answer (`pip install langchain-openai`).

.venv/bin/python examples/langchain_chat.py
"""

from __future__ import annotations

import os
from typing import Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

QUESTION = "Which city is the capital of France?"


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome", "Oslo"]


class Weather(BaseModel):
    """Look the weather up."""

    city: Literal["Paris", "Rome", "Oslo"]
    unit: Literal["celsius", "fahrenheit"]


def main() -> None:
    chat = ChatOpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=SecretStr(os.environ.get("OPENAI_API_KEY", "unused")),
        model="default",
        temperature=0,
        max_completion_tokens=60,
    )
    for chunk in chat.stream(QUESTION):
        print(chunk.text, end="", flush=True)
    called = chat.bind_tools([Weather], tool_choice="Weather").invoke("How warm is it in Rome?")
    for call in called.tool_calls:
        print(f"\ncalls {call['name']}({call['args']})")
    print(chat.with_structured_output(City).invoke(QUESTION))


if __name__ == "__main__":
    main()
