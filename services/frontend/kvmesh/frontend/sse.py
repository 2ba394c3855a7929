"""The bytes of a server-sent answer. What is the same in every chunk is encoded once."""

from __future__ import annotations

from typing import Any

import orjson

from kvmesh.common.errors import KvmeshError

DONE = b"data: [DONE]\n\n"


class ChunkWriter:
    """Writes the chunks of one answer, of either endpoint."""

    def __init__(self, head: dict[str, Any], *, chat: bool, include_usage: bool) -> None:
        """`head`: the fields before `choices` that all chunks share (id, object, created, model)."""
        self._chat = chat
        self._start = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        # OpenAI sends a null where the usage comes later, and no such field where it never comes.
        self._end = b',"usage":null' if include_usage else b""
        if chat:
            self._before = self._start + b'{"index":0,"delta":{"content":'
            self._after = b'},"logprobs":null,"finish_reason":null}]' + self._end + b"}\n\n"
        else:
            self._before = self._start + b'{"index":0,"text":'
            self._after = b',"logprobs":null,"finish_reason":null}]' + self._end + b"}\n\n"

    def role(self) -> bytes:
        """The first chunk of a chat answer."""
        delta = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        return self._start + delta + self._end + b"}\n\n"

    def text(self, piece: str) -> bytes:
        return self._before + orjson.dumps(piece) + self._after

    def finish(self, reason: str, extra: dict[str, Any] | None = None) -> bytes:
        """The chunk that says why the answer ended; `extra` fields stand beside `choices`."""
        choice = {"index": 0, **({"delta": {}} if self._chat else {"text": ""}), "logprobs": None}
        choice["finish_reason"] = reason
        return self._start + orjson.dumps(choice) + b"]" + self._end + _fields(extra) + b"}\n\n"

    def usage(self, usage: dict[str, Any], extra: dict[str, Any] | None = None) -> bytes:
        """The chunk without choices that carries the usage."""
        return self._start + b"]" + _fields({"usage": usage, **(extra or {})}) + b"}\n\n"


def error_chunk(error: KvmeshError) -> bytes:
    """What a stream ends with when it cannot go on; OpenAI clients raise it."""
    return b"data: " + orjson.dumps(error.to_openai()) + b"\n\n"


def _fields(extra: dict[str, Any] | None) -> bytes:
    return b"," + orjson.dumps(extra)[1:-1] if extra else b""
