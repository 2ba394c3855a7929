"""The Responses API: a stored answer, and a second question that goes on with it, streamed.

.venv/bin/python examples/openai_responses.py
"""

from __future__ import annotations

import os

import openai


def main() -> None:
    client = openai.OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "unused"),
    )
    first = client.responses.create(
        model="default",
        instructions="Answer in one sentence.",
        input="Which city is the capital of France?",
        max_output_tokens=60,
        temperature=0,
    )
    print(f"first: {first.output_text}")
    # The server has the conversation; only what is new is sent.
    with client.responses.stream(
        model="default",
        previous_response_id=first.id,
        input="Name a river that runs through it.",
        max_output_tokens=60,
        temperature=0,
    ) as stream:
        print("then: ", end="")
        for event in stream:
            if event.type == "response.output_text.delta":
                print(event.delta, end="", flush=True)
        usage = stream.get_final_response().usage
    assert usage is not None
    cached = usage.input_tokens_details.cached_tokens
    print(f"\n{usage.input_tokens} input tokens, {cached} of them cached")


if __name__ == "__main__":
    main()
