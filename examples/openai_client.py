"""Stream a chat answer with the official OpenAI client (`pip install openai`).

.venv/bin/python examples/openai_client.py "What is the capital of France?"
"""

from __future__ import annotations

import argparse
import os
import sys

import openai


def main() -> int:
    parser = argparse.ArgumentParser(description="Stream a chat answer with the OpenAI client.")
    parser.add_argument("prompt", help="what to ask")
    url = os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1")
    parser.add_argument("--base-url", default=url, help="the kvmesh endpoint")
    parser.add_argument("--model", default="default", help="model name or alias")
    options = parser.parse_args()

    client = openai.OpenAI(base_url=options.base_url, api_key=os.environ.get("OPENAI_API_KEY", "unused"))
    try:
        stream = client.chat.completions.create(
            model=options.model,
            messages=[{"role": "user", "content": options.prompt}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            # kvmesh's own: says where the request ran and how long each part of its way took.
            extra_body={"kvmesh": {"explain": True}},
        )
        for chunk in stream:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
            if chunk.usage:
                print(
                    f"\n\n{chunk.usage.prompt_tokens} prompt + {chunk.usage.completion_tokens} output tokens"
                )
                print((chunk.model_extra or {}).get("kvmesh"))
    except openai.OpenAIError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
