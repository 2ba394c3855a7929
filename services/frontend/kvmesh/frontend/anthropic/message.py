"""An answer as Anthropic's message: whole, and as the events that build it up."""

from __future__ import annotations

import uuid
from typing import Any, Literal

import orjson

from kvmesh.frontend.protocol.messages import read_arguments
from kvmesh.frontend.serving.answers import Answers
from kvmesh.frontend.serving.calls import CallDelta
from kvmesh.frontend.serving.explain import usage
from kvmesh.frontend.serving.text import Delta
from kvmesh.frontend.serving.thoughts import digest, seal

Event = dict[str, Any]
# Whether what the model thinks is sent as it comes, as a signature alone, or not at all.
Thoughts = Literal["shown", "sealed", "none"]


class Message:
    """Grows by the deltas of one answer; what each adds is returned as events, in the order of a stream."""

    def __init__(self, model: str, answers: Answers, wanted_tokens: int, thoughts: Thoughts) -> None:
        """`wanted_tokens`: how long the client has allowed the answer to be."""
        self._answers = answers
        self._wanted = wanted_tokens
        self._thoughts = thoughts
        self._content: list[dict[str, Any]] = []
        # Of the open block: its text, or its input as JSON text.
        self._pieces: list[str] = []
        # The number of the call that is open, as the answer counts them.
        self._call = -1
        self._open = False
        self._head = {
            "id": f"msg_{uuid.uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def start(self) -> list[Event]:
        """Once the first delta is there."""
        message = {**self._head, "content": [], **self._end, "usage": self._usage()}
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def add(self, delta: Delta) -> list[Event]:
        events: list[Event] = []
        if delta.reasoning and self._thoughts != "none":
            if not self._in("thinking"):
                events += self._begin({"type": "thinking", "thinking": "", "signature": ""})
            self._pieces.append(delta.reasoning)
            if self._thoughts == "shown":
                events.append(self._delta({"type": "thinking_delta", "thinking": delta.reasoning}))
        if delta.text:
            if not self._in("text"):
                events += self._begin({"type": "text", "text": ""})
            self._pieces.append(delta.text)
            events.append(self._delta({"type": "text_delta", "text": delta.text}))
        for piece in delta.calls:
            events += self._add_call(piece)
        return events

    def finish(self, reason: str, matched: str | None) -> list[Event]:
        """`reason` is chat's; `matched` the stop string that ended the answer."""
        events = self._close()
        self._end = {"stop_reason": self._stop_reason(reason, matched), "stop_sequence": matched}
        events.append({"type": "message_delta", "delta": self._end, "usage": self._usage()})
        events.append({"type": "message_stop"})
        return events

    def json(self) -> dict[str, Any]:
        """The whole message; after `finish`."""
        return {**self._head, "content": self._content, **self._end, "usage": self._usage()}

    def _add_call(self, piece: CallDelta) -> list[Event]:
        events: list[Event] = []
        if piece.id:
            self._call = piece.index
            identity = f"toolu_{piece.id.removeprefix('call_')}"
            events += self._begin({"type": "tool_use", "id": identity, "name": piece.name, "input": {}})
        if piece.arguments:
            self._pieces.append(piece.arguments)
            events.append(self._delta({"type": "input_json_delta", "partial_json": piece.arguments}))
        return events

    def _begin(self, block: dict[str, Any]) -> list[Event]:
        events = self._close()
        self._content.append(block)
        self._open = True
        # A copy: the block goes on growing.
        start = {"type": "content_block_start", "index": len(self._content) - 1, "content_block": {**block}}
        return [*events, start]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta}

    def _close(self) -> list[Event]:
        if not self._open:
            return []
        self._open = False
        block, written = self._content[-1], "".join(self._pieces)
        self._pieces = []
        events: list[Event] = []
        if block["type"] == "text":
            block["text"] = written
        elif block["type"] == "thinking":
            shown = self._thoughts == "shown"
            block["thinking"] = written if shown else ""
            block["signature"] = digest(written) if shown else seal(written)
            events.append(self._delta({"type": "signature_delta", "signature": block["signature"]}))
        else:
            block["input"] = read_arguments(written)
        return [*events, {"type": "content_block_stop", "index": len(self._content) - 1}]

    def _in(self, kind: str) -> bool:
        return self._open and self._content[-1]["type"] == kind

    def _stop_reason(self, reason: str, matched: str | None) -> str:
        if matched is not None:
            return "stop_sequence"
        if reason == "tool_calls":
            return "tool_use"
        if reason == "stop":
            return "end_turn"
        had = self._answers.sessions[0].call.sampling.max_new_tokens
        return "max_tokens" if had == self._wanted else "model_context_window_exceeded"

    def _usage(self) -> dict[str, Any]:
        used = usage(self._answers)
        cached = used.cached.device + used.cached.host + used.cached.nvme + used.cached.network
        return {
            # Anthropic's three kinds of input add up to the prompt.
            "input_tokens": used.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": used.completion_tokens,
            "service_tier": "standard",
        }


def event_bytes(events: list[Event]) -> bytes:
    return b"".join(
        b"event: %s\ndata: %s\n\n" % (event["type"].encode(), orjson.dumps(event)) for event in events
    )
