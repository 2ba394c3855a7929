"""What a response has said so far, as items, and the events by which it grows."""

from __future__ import annotations

from typing import Any

import orjson

from kvmesh.frontend.responses.items import new_id
from kvmesh.frontend.serving.calls import CallDelta
from kvmesh.frontend.serving.scores import Score, chat_logprobs
from kvmesh.frontend.serving.text import Delta
from kvmesh.frontend.serving.thoughts import seal

# Without its sequence number, which it gets as it is sent.
Event = dict[str, Any]


def frame(event: Event) -> bytes:
    """As it is sent."""
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), orjson.dumps(event))


class Output:
    """One item is open at a time: what the model thinks, a message with one part of text, or a call."""

    def __init__(self, *, sealed: bool = False) -> None:
        """`sealed`: what the model thinks is also sent in `encrypted_content`."""
        self.items: list[dict[str, Any]] = []
        self._sealed = sealed
        self._open = False
        # Of the open item: its text or arguments, and its scores.
        self._pieces: list[str] = []
        self._scores: list[Score] = []

    def add(self, delta: Delta) -> list[Event]:
        events: list[Event] = []
        if delta.reasoning:
            if not self._in("reasoning"):
                item = {"id": new_id("rs"), "type": "reasoning", "summary": [], "content": []}
                events += self._begin_part(item, _thought(""))
            self._pieces.append(delta.reasoning)
            said = {"type": "response.reasoning_text.delta", "delta": delta.reasoning}
            events.append({**said, **self._part_place()})
        # Scores alone, such as of a mark of reasoning, are no message.
        scored = delta.scores and self._in("message") and not delta.calls
        if delta.text or scored:
            if not self._in("message"):
                events += self._begin_message()
            self._pieces.append(delta.text)
            self._scores += delta.scores
            events.append(
                {
                    "type": "response.output_text.delta",
                    **self._part_place(),
                    "delta": delta.text,
                    "logprobs": _logprobs(delta.scores),
                }
            )
        for piece in delta.calls:
            events += self._add_call(piece)
        return events

    def close(self, status: str) -> list[Event]:
        """End the open item; `status`: completed or incomplete. An answer without any item has said nothing:
        an empty message."""
        events = [] if self.items else self._begin_message()
        if not self._open:
            return events
        self._open = False
        item, text = self.items[-1], "".join(self._pieces)
        item["status"] = status
        if item["type"] == "message":
            part = {
                "type": "output_text",
                "text": text,
                "annotations": [],
                "logprobs": _logprobs(self._scores),
            }
            item["content"] = [part]
            place = self._part_place()
            done = {"type": "response.output_text.done", "text": text, "logprobs": part["logprobs"]}
            events.append({**done, **place})
            events.append({"type": "response.content_part.done", **place, "part": part})
        elif item["type"] == "reasoning":
            part, place = _thought(text), self._part_place()
            item["content"] = [part]
            if self._sealed:
                item["encrypted_content"] = seal(text)
            events.append({"type": "response.reasoning_text.done", "text": text, **place})
            events.append({"type": "response.content_part.done", **place, "part": part})
        else:
            item["arguments"] = text
            done = {"type": "response.function_call_arguments.done", **self._item_place()}
            events.append({**done, "name": item["name"], "arguments": text})
        self._pieces, self._scores = [], []
        events.append(self._item_event("done"))
        return events

    def _begin_message(self) -> list[Event]:
        message = {"id": new_id("msg"), "type": "message", "role": "assistant", "content": []}
        return self._begin_part(
            message, {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        )

    def _begin_part(self, item: dict[str, Any], part: dict[str, Any]) -> list[Event]:
        events = self._begin(item)
        return [*events, {"type": "response.content_part.added", **self._part_place(), "part": part}]

    def _add_call(self, piece: CallDelta) -> list[Event]:
        events: list[Event] = []
        if piece.id:
            call = {"id": new_id("fc"), "type": "function_call", "call_id": piece.id, "name": piece.name}
            events += self._begin({**call, "arguments": ""})
        if piece.arguments:
            self._pieces.append(piece.arguments)
            delta = {"type": "response.function_call_arguments.delta", **self._item_place()}
            events.append({**delta, "delta": piece.arguments})
        return events

    def _begin(self, item: dict[str, Any]) -> list[Event]:
        events = self.close("completed") if self.items else []
        self.items.append({**item, "status": "in_progress"})
        self._open = True
        return [*events, self._item_event("added")]

    def _in(self, kind: str) -> bool:
        return self._open and self.items[-1]["type"] == kind

    def _item_event(self, what: str) -> Event:
        # A copy: the item goes on growing.
        index, item = len(self.items) - 1, dict(self.items[-1])
        return {"type": f"response.output_item.{what}", "output_index": index, "item": item}

    def _item_place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _part_place(self) -> dict[str, Any]:
        return {**self._item_place(), "content_index": 0}


def _thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _logprobs(scores: Any) -> list[dict[str, Any]]:
    return chat_logprobs(scores)["content"] if scores else []
