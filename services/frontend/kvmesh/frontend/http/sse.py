"""The bytes of a server-sent answer. What is the same in every chunk is encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.serving.calls import CallDelta, finish_reason, joined
from kvmesh.frontend.serving.scores import Score, chat_logprobs, completion_logprobs

DONE = b"data: [DONE]\n\n"
_OPEN = b',"finish_reason":null}]'
_NO_LOGPROBS = b',"logprobs":null'


class ChunkWriter:
    """Writes the chunks of one choice, of either endpoint."""

    def __init__(
        self,
        head: dict[str, Any],
        *,
        chat: bool,
        include_usage: bool,
        index: int = 0,
        call_is_function: bool = False,
    ) -> None:
        """`head`: the fields before `choices` that all chunks share (id, object, created, model).
        `call_is_function`: a call is spelled `function_call`."""
        self._chat = chat
        self._call_is_function = call_is_function
        self._index = index
        self._start = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        # OpenAI sends a null where the usage comes later, and no such field where it never comes.
        self._end = (b',"usage":null' if include_usage else b"") + b"}\n\n"
        choice = self._start + b'{"index":%d' % index
        self._delta = choice + (b',"delta":' if chat else b',"text":')
        self._before = self._delta + (b'{"content":' if chat else b"")
        self._close = b"}" if chat else b""
        self._after = self._close + _NO_LOGPROBS + _OPEN + self._end

    def role(self) -> bytes:
        """The first chunk of a chat choice."""
        return self._delta + b'{"role":"assistant","content":""}' + _NO_LOGPROBS + _OPEN + self._end

    def text(self, piece: str, scores: Sequence[Score] = ()) -> bytes:
        if not scores:
            return self._before + orjson.dumps(piece) + self._after
        return self._before + orjson.dumps(piece) + self._close + self._logprobs(scores) + _OPEN + self._end

    def reasoning(self, piece: str, scores: Sequence[Score] = ()) -> bytes:
        """What the model thought, of a chat choice."""
        return self._event({"reasoning_content": piece}, scores)

    def calls(self, deltas: Sequence[CallDelta], scores: Sequence[Score] = ()) -> bytes:
        """Pieces of tool calls, of a chat choice."""
        if self._call_is_function:
            return self._event({"function_call": _function(joined(deltas))}, scores)
        return self._event({"tool_calls": [_call_chunk(delta) for delta in deltas]}, scores)

    def _event(self, delta: dict[str, Any], scores: Sequence[Score]) -> bytes:
        return self._delta + orjson.dumps(delta) + self._logprobs(scores) + _OPEN + self._end

    def _logprobs(self, scores: Sequence[Score]) -> bytes:
        if not scores:
            return _NO_LOGPROBS
        logprobs = chat_logprobs(scores) if self._chat else completion_logprobs(scores)
        return b',"logprobs":' + orjson.dumps(logprobs)

    def finish(self, reason: str, extra: dict[str, Any] | None = None) -> bytes:
        """The chunk that says why the choice ended; `extra` fields stand beside `choices`."""
        choice = {"index": self._index, **({"delta": {}} if self._chat else {"text": ""}), "logprobs": None}
        choice["finish_reason"] = finish_reason(reason, call_is_function=self._call_is_function)
        return self._start + orjson.dumps(choice) + b"]" + _fields(extra) + self._end

    def usage(self, usage: dict[str, Any], extra: dict[str, Any] | None = None) -> bytes:
        """The chunk without choices that carries the usage."""
        return self._start + b"]" + _fields({"usage": usage, **(extra or {})}) + b"}\n\n"


def error_chunk(error: KvmeshError) -> bytes:
    """What a stream ends with when it cannot go on; OpenAI clients raise it."""
    return b"data: " + orjson.dumps(error.to_openai()) + b"\n\n"


def _call_chunk(delta: CallDelta) -> dict[str, Any]:
    if not delta.id:
        return {"index": delta.index, "function": _function(delta)}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": _function(delta)}


def _function(delta: CallDelta) -> dict[str, Any]:
    arguments = {"arguments": delta.arguments}
    return {"name": delta.name, **arguments} if delta.id else arguments


def _fields(extra: dict[str, Any] | None) -> bytes:
    return b"," + orjson.dumps(extra)[1:-1] if extra else b""
