"""A chat that goes through tools: the model asks for a function, the client runs it and tells the result.

.venv/bin/python examples/openai_tools.py ["How warm is it in Rome?"]
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import openai

TURNS = 4
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city now.",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Paris", "Rome", "Oslo"]},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    }
]


def weather(city: str, unit: str) -> dict[str, Any]:
    celsius = {"Paris": 18, "Rome": 25, "Oslo": 9}[city]
    return {"city": city, unit: celsius if unit == "celsius" else celsius * 9 / 5 + 32}


def main() -> None:
    client = openai.OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "unused"),
    )
    question = sys.argv[1] if len(sys.argv) > 1 else "How warm is it in Paris?"
    messages: list[Any] = [{"role": "user", "content": question}]
    # Small models do not think of tools by themselves; for others "auto" is enough from the beginning.
    choice: Any = "required"
    for _ in range(TURNS):
        said = client.chat.completions.create(
            model="default",
            messages=messages,
            tools=TOOLS,
            tool_choice=choice,
            temperature=0,
            max_completion_tokens=200,
        )
        answer: Any = said.choices[0].message
        messages.append(answer)
        if not answer.tool_calls:
            print(f"answer: {answer.content}")
            return
        for call in answer.tool_calls:
            result = json.dumps(weather(**json.loads(call.function.arguments)))
            print(f"{call.function.name}({call.function.arguments}) -> {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        choice = "auto"


if __name__ == "__main__":
    main()
