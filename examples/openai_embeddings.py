"""Texts ranked by how near they are to a question, by a model that embeds.

.venv/bin/python examples/openai_embeddings.py [MODEL]
"""

from __future__ import annotations

import os
import sys

import openai

TEXTS = [
    "Share prices dropped a lot this afternoon.",
    "A kitten rests on a rug.",
    "The parliament voted on the budget.",
]


def main() -> int:
    client = openai.OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "unused"),
    )
    able = [one.id for one in client.models.list() if "embed" in (one.model_extra or {})["capabilities"]]
    names = sys.argv[1:] or able
    if not names:
        print("error: no model that embeds is served; see docs/reference/models.md", file=sys.stderr)
        return 1
    model = names[0]
    found = client.embeddings.create(model=model, input=["A cat sits on the mat.", *TEXTS])
    question, *texts = (one.embedding for one in found.data)
    # Vectors have length 1.
    nearness = [sum(a * b for a, b in zip(question, text, strict=True)) for text in texts]
    for near, text in sorted(zip(nearness, TEXTS, strict=True), reverse=True):
        print(f"{near:.2f} {text}")
    print(f"{model}: {len(question)} numbers each, {found.usage.prompt_tokens} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
