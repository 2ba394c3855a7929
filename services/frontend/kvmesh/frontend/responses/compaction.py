"""A conversation made shorter: what its user has said, and the model's own notes on all of it."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Any

from pydantic import Field

from kvmesh.frontend.protocol.generation import ServiceTier
from kvmesh.frontend.responses.items import new_id
from kvmesh.frontend.responses.request import ConversationRequest
from kvmesh.frontend.responses.response import response_usage
from kvmesh.frontend.serving.answers import Answers
from kvmesh.frontend.serving.thoughts import seal

# Tokens.
LONGEST_SUMMARY = 2_048
SUMMARIZE = (
    "Write down everything from this conversation that is needed to go on with it without having read it: "
    "what was asked for, what was found out and decided, names and figures as they stand, and what is left "
    "to do. Answer with these notes alone."
)


class CompactRequest(ConversationRequest):
    """Of a conversation that is to be shorter."""

    service_tier: ServiceTier | None = None
    prompt_cache_key: str | None = Field(default=None, max_length=64)

    def _chat_fields(self) -> dict[str, Any]:
        return {
            **super()._chat_fields(),
            "service_tier": self.service_tier,
            "prompt_cache_key": self.prompt_cache_key,
            "max_completion_tokens": LONGEST_SUMMARY,
        }


class Compaction:
    """Driven once, by `result`."""

    def __init__(self, answers: Answers, items: list[dict[str, Any]]) -> None:
        """`items`: the conversation; `answers`: of the model that was asked to sum it up."""
        self.answers = answers
        self._said = [item for item in items if item["type"] == "message" and item["role"] == "user"]

    async def result(self) -> dict[str, Any]:
        """The object that its client is told. Raises KvmeshError."""
        notes: list[str] = []
        with self.answers as answers:
            async with aclosing(answers.deltas()) as deltas:
                async for _, delta in deltas:
                    notes.append(delta.text)
            summary = {"id": new_id("cmp"), "type": "compaction", "encrypted_content": seal("".join(notes))}
            return {
                "id": new_id("resp"),
                "object": "response.compaction",
                "created_at": int(time.time()),
                "output": [*self._said, summary],
                "usage": response_usage(answers),
            }
