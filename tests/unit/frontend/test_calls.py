"""Calls in constrained JSON, wherever it is cut."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from kvmesh.frontend.calls import CallArray, CallParser, NamedCall

ARGUMENTS: list[Any] = [
    {},
    {"x": 1, "y": [1, {"name": "arguments", "arguments": "}"}]},
    {"text": 'a "quoted" \\ {brace] \n é 🗼', "null": None},
    {"deep": [[[{"a": {}}]]]},
]


def gather(parser: CallParser, pieces: list[str]) -> list[tuple[str, str]]:
    """Name and arguments of each call."""
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        for delta in parser.feed(piece):
            if delta.id:
                assert delta.index == len(calls)
                calls.append((delta.name, ""))
            name, arguments = calls[delta.index]
            calls[delta.index] = (name, arguments + delta.arguments)
    return calls


def cuts(text: str) -> list[list[str]]:
    chance = random.Random(7)
    places = [sorted(chance.sample(range(1, len(text)), 3)) for _ in range(20)]
    cut = [[text[a:b] for a, b in zip([0, *p], [*p, len(text)], strict=True)] for p in places]
    return [[text], list(text), *cut]


@pytest.mark.parametrize("layout", [{}, {"separators": (",", ":")}, {"indent": 2}, {"ensure_ascii": False}])
def test_an_array_of_calls(layout: dict[str, Any]) -> None:
    calls = [{"name": f"f\u00e9{i}", "arguments": arguments} for i, arguments in enumerate(ARGUMENTS)]
    for pieces in cuts(json.dumps(calls, **layout)):
        gathered = gather(CallArray(), pieces)
        assert [name for name, _ in gathered] == [call["name"] for call in calls]
        assert [json.loads(arguments) for _, arguments in gathered] == ARGUMENTS


@pytest.mark.parametrize("arguments", ["x } y", 3, ["a", 1], None])
def test_arguments_that_are_no_object(arguments: Any) -> None:
    text = json.dumps([{"name": "f", "arguments": arguments}, {"name": "g", "arguments": {}}])
    for pieces in cuts(text):
        assert [(n, json.loads(a)) for n, a in gather(CallArray(), pieces)] == [("f", arguments), ("g", {})]


def test_arguments_cut_short() -> None:
    assert gather(CallArray(), ['[{"name": "f", "argum', 'ents": {"x": "a'])[0] == ("f", '{"x": "a')


def test_a_named_call() -> None:
    for pieces in cuts('{"x": [1, 2]}'):
        assert gather(NamedCall("f"), ["", *pieces]) == [("f", '{"x": [1, 2]}')]
