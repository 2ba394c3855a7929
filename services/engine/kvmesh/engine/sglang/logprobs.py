"""Log probabilities in SGLang's outputs: columns by request, decoded only where somebody asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from kvmesh.engine.contract import Logprob

LOGPROB_FIELDS = (
    "input_token_logprobs_val",
    "input_top_logprobs_val",
    "input_top_logprobs_idx",
    "output_token_logprobs_val",
    "output_top_logprobs_val",
    "output_top_logprobs_idx",
)
_Values = Sequence[float | None] | None
_decode_values = msgspec.msgpack.Decoder(list[list[float | None] | None] | None).decode
_decode_tops = msgspec.msgpack.Decoder(list[list[list[float] | None] | None] | None).decode
_decode_ids = msgspec.msgpack.Decoder(list[list[list[int] | None] | None] | None).decode


class StepLogprobs:
    """One output message's. Each of `output` and `prompt` takes a request's place in the message."""

    __slots__ = ("_message", "_output", "_prompt")

    def __init__(self, message: Any) -> None:
        self._message = message
        self._output = _columns(message, "output")
        self._prompt: tuple[Any, Any, Any] | None = None

    @classmethod
    def of(cls, message: Any) -> StepLogprobs | None:
        # One byte: nil, or no request's.
        return cls(message) if len(message.output_token_logprobs_val) > 1 else None

    def output(self, place: int) -> list[Logprob]:
        """Of the new tokens, in order; empty for a request that did not ask."""
        return _pair(*(column and column[place] for column in self._output))

    def prompt(self, place: int) -> list[Logprob]:
        """Of the prompt's tokens but the first, in the request's first output only."""
        if self._prompt is None:
            self._prompt = _columns(self._message, "input")
        values, tops, ids = (column and column[place] for column in self._prompt)
        # The first token has nothing before it: SGLang says None.
        return _pair(values and values[1:], tops and tops[1:], ids and ids[1:])


def _columns(message: Any, side: str) -> tuple[Any, Any, Any]:
    return (
        _decode_values(getattr(message, f"{side}_token_logprobs_val")),
        _decode_tops(getattr(message, f"{side}_top_logprobs_val")),
        _decode_ids(getattr(message, f"{side}_top_logprobs_idx")),
    )


def _pair(values: _Values, tops: Any, ids: Any) -> list[Logprob]:
    return [
        Logprob(
            float("-inf") if value is None else value,
            tuple(zip(ids[i] or (), tops[i] or (), strict=True)) if tops and i < len(tops) else (),
        )
        for i, value in enumerate(values or ())
    ]
