"""Anthropic's client: a streamed message (`pip install anthropic`).

.venv/bin/python examples/anthropic_messages.py
"""

from __future__ import annotations

import os

import anthropic


def main() -> None:
    client = anthropic.Anthropic(
        base_url=os.environ.get("ANTHROPIC_BASE_URL", "http://localhost:8000"),
        api_key=os.environ.get("ANTHROPIC_API_KEY", "unused"),
    )
    with client.messages.stream(
        model="default",
        max_tokens=60,
        system="Answer in one sentence.",
        messages=[{"role": "user", "content": "Which city is the capital of France?"}],
    ) as stream:
        for text in stream.text_stream:
            print(text, end="", flush=True)
        message = stream.get_final_message()
    print(f"\n{message.stop_reason}: {message.usage.output_tokens} output tokens")


if __name__ == "__main__":
    main()
