"""Pieces of tool calls, and the call that an answer constrained to one function's arguments is.

Calls that stand in a text are for the text stream's parsers.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class CallDelta:
    """A piece of a call; `id` and `name` come with the first, `arguments` add up to JSON."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


def joined(pieces: Sequence[CallDelta]) -> CallDelta:
    """Pieces of one call as one."""
    first = pieces[0]
    return CallDelta(first.index, first.id, first.name, "".join(piece.arguments for piece in pieces))


def finish_reason(reason: str, *, call_is_function: bool) -> str:
    """As clients are told it: who spells a call `function_call` reads of its end likewise."""
    return "function_call" if call_is_function and reason == "tool_calls" else reason


class NamedCall:
    """The answer is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name = name

    def feed(self, text: str) -> list[CallDelta]:
        """What this text adds to the call."""
        if not text:
            return []
        name, self._name = self._name, ""
        return [CallDelta(0, f"call_{uuid.uuid4().hex[:24]}" if name else "", name, text)]
