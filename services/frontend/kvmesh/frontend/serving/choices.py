"""An answer as REST's clients read it whole: what stands above its choices, and each choice."""

from __future__ import annotations

import os
import time
from typing import Any

from kvmesh.frontend.serving.answers import Answers
from kvmesh.frontend.serving.calls import CallDelta, finish_reason
from kvmesh.frontend.serving.scores import Score, chat_logprobs, completion_logprobs
from kvmesh.frontend.serving.text import Delta


def answer_head(answers: Answers, *, chat: bool, tier: str) -> dict[str, Any]:
    """Id, time and model of an answer; `tier` is the service tier a chat names."""
    model = answers.call.model
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{os.urandom(16).hex()}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": model.fingerprint,
        **({"service_tier": tier} if chat else {}),
    }


class Choice:
    """Gathers the deltas of one answer."""

    def __init__(
        self, index: int, *, chat: bool, call_is_function: bool = False, shows_scores: bool = True
    ) -> None:
        """`call_is_function`: a call is spelled `function_call`."""
        self.index = index
        self._shows_scores = shows_scores
        self._chat = chat
        self._call_is_function = call_is_function
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._scores: list[Score] = []
        self._calls: list[CallDelta] = []
        self._finish_reason = ""

    def add(self, delta: Delta) -> None:
        self._text.append(delta.text)
        self._reasoning.append(delta.reasoning)
        self._scores += delta.scores
        self._finish_reason = delta.finish_reason
        for piece in delta.calls:
            if piece.id:
                self._calls.append(piece)
            else:
                self._calls[-1].arguments += piece.arguments

    def worth(self, after: int) -> float:
        """Mean log probability of its tokens, behind the first `after` characters."""
        scores = [one.logprob for one in self._scores if one.start >= after and one.logprob is not None]
        return sum(scores) / len(scores) if scores else 0.0

    def json(self) -> dict[str, Any]:
        written = chat_logprobs if self._chat else completion_logprobs
        choice: dict[str, Any] = {
            "index": self.index,
            "logprobs": written(self._scores) if self._scores and self._shows_scores else None,
            "finish_reason": finish_reason(self._finish_reason, call_is_function=self._call_is_function),
        }
        text = "".join(self._text)
        if not self._chat:
            choice["text"] = text
        else:
            choice["message"] = self._message(text)
        return choice

    def _message(self, text: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if reasoning := "".join(self._reasoning):
            message["reasoning_content"] = reasoning
        if self._calls:
            message["content"] = text or None
        if self._calls and self._call_is_function:
            called = self._calls[0]
            message["function_call"] = {"name": called.name, "arguments": called.arguments}
        elif self._calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self._calls
            ]
        return message
