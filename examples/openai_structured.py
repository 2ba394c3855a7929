"""An answer as an object of a class: the schema holds, whatever the model.

.venv/bin/python examples/openai_structured.py
"""

from __future__ import annotations

import os
from typing import Literal

import openai
from pydantic import BaseModel, Field


class City(BaseModel):
    name: Literal["Paris", "Rome", "Oslo"]
    country: Literal["France", "Italy", "Norway"]
    districts: int = Field(ge=1, le=99)


def main() -> None:
    client = openai.OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "unused"),
    )
    said = client.chat.completions.parse(
        model="default",
        messages=[{"role": "user", "content": "Which city is the capital of France?"}],
        response_format=City,
        temperature=0,
    )
    city = said.choices[0].message.parsed
    assert isinstance(city, City)
    print(f"{city.name} in {city.country} has {city.districts} districts")


if __name__ == "__main__":
    main()
