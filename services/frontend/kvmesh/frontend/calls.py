"""Tool calls in an answer that must be calls: constrained to JSON, and told apart as it comes.

What a model writes in its own way when it may choose is for the text stream's parsers.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class CallDelta:
    """A piece of a call; `id` and `name` come with the first, `arguments` add up to JSON."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class CallParser(Protocol):
    def feed(self, text: str) -> list[CallDelta]:
        """What this text adds to the calls."""
        ...


class NamedCall:
    """The answer is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self._name = name

    def feed(self, text: str) -> list[CallDelta]:
        if not text:
            return []
        name, self._name = self._name, ""
        return [CallDelta(0, new_call_id() if name else "", name, text)]


class CallArray:
    """The answer is an array of {"name", "arguments"}, in this order."""

    def __init__(self) -> None:
        self._index = -1
        # Brackets that are open; 2 inside a call, more inside its arguments.
        self._depth = 0
        self._string = self._escaped = False
        # The string of the call's own that is being read, and the key that was read last.
        self._spelled = ""
        self._key = ""
        self._value = False

    def feed(self, text: str) -> list[CallDelta]:
        deltas: list[CallDelta] = []
        for letter in text:
            within = self._value and self._key == "arguments"
            if self._string:
                self._letter(letter, deltas)
            elif letter == '"':
                self._string = True
                self._spelled = ""
            elif letter in "{[":
                self._depth += 1
                if self._depth == 2:
                    self._index += 1
                    self._key, self._value = "", False
            elif letter in "}]":
                if self._depth == 2:
                    # The call's own end.
                    within = self._value = False
                self._depth -= 1
            elif letter == ":" and self._depth == 2:
                self._value = True
                continue
            elif letter == "," and self._depth == 2:
                self._value = within = False
            if within and (letter.strip() or self._depth > 2 or self._string):
                _append(deltas, self._index, letter)
        return deltas

    def _letter(self, letter: str, deltas: list[CallDelta]) -> None:
        if self._escaped:
            self._escaped = False
        elif letter == "\\":
            self._escaped = True
        elif letter == '"':
            self._string = False
            if self._depth == 2:
                self._spell(json.loads(f'"{self._spelled}"'), deltas)
            return
        self._spelled += letter if self._depth == 2 else ""

    def _spell(self, text: str, deltas: list[CallDelta]) -> None:
        if not self._value:
            self._key = text
        elif self._key == "name":
            deltas.append(CallDelta(self._index, new_call_id(), text))


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _append(deltas: list[CallDelta], index: int, letter: str) -> None:
    if not deltas or deltas[-1].index != index:
        deltas.append(CallDelta(index))
    deltas[-1].arguments += letter
