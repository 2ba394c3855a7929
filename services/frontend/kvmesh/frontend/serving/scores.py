"""Log probabilities of an answer's tokens, beside its text, and as OpenAI writes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvmesh.core import TextModel
from kvmesh.v1.engine_pb2 import TokenLogprob

# What JSON has for minus infinity, by OpenAI's convention.
_IMPOSSIBLE = -9999.0


@dataclass(slots=True)
class Score:
    """One token's. `start` is where its text begins, in characters of the answer."""

    token: bytes
    start: int
    # None for a prompt's first token.
    logprob: float | None
    top: Sequence[tuple[bytes, float]]


class Scores:
    """Of one answer. Those of tokens whose text is held back wait: a client gets both together."""

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._waiting: deque[Score] = deque()

    def add(self, token: int, logprob: TokenLogprob | None, start: int) -> None:
        self._waiting.append(score(self._model, token, logprob, start))

    def take(self, shown: int) -> list[Score]:
        """Of the tokens that begin in the first `shown` characters."""
        taken = []
        while self._waiting and self._waiting[0].start < shown:
            taken.append(self._waiting.popleft())
        return taken

    def rest(self) -> list[Score]:
        taken = list(self._waiting)
        self._waiting.clear()
        return taken


def score(model: TextModel, token: int, logprob: TokenLogprob | None, start: int) -> Score:
    """A token's, by itself or, without `logprob`, as the first of a prompt."""
    spelled = model.token(token)[1]
    if logprob is None:
        return Score(spelled, start, None, ())
    top = zip(logprob.top_ids, logprob.top_logprobs, strict=True)
    return Score(
        spelled,
        start,
        max(logprob.logprob, _IMPOSSIBLE),
        [(model.token(one)[1], max(value, _IMPOSSIBLE)) for one, value in top],
    )


def chat_logprobs(scores: Iterable[Score]) -> dict[str, Any]:
    """A chat choice's `logprobs`."""
    content = [
        {
            **_entry(one.token, one.logprob),
            "top_logprobs": [_entry(token, value) for token, value in one.top],
        }
        for one in scores
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(scores: Sequence[Score]) -> dict[str, Any]:
    """A completion choice's `logprobs`. A token is among its alternatives, however unlikely it was."""
    return {
        "tokens": [_text(one.token) for one in scores],
        "token_logprobs": [one.logprob for one in scores],
        "top_logprobs": [
            {_text(token): value for token, value in (*one.top, (one.token, one.logprob))}
            if one.logprob is not None
            else None
            for one in scores
        ],
        "text_offset": [one.start for one in scores],
    }


def _entry(token: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _text(token), "logprob": logprob, "bytes": list(token)}


def _text(token: bytes) -> str:
    return token.decode(errors="replace")
