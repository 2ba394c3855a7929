"""Calls in constrained JSON, wherever its tokens are cut."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from fixtures.frontend import model_path
from kvmesh.core import TextModel, TextStream

ARGUMENTS: list[Any] = [
    {},
    {"x": 1, "y": [1, {"name": "arguments", "arguments": "}"}]},
    {"text": 'a "quoted" \\ {brace] \n é 🗼', "null": None},
    {"deep": [[[{"a": {}}]]]},
]


@pytest.fixture(scope="module")
def model() -> TextModel:
    return TextModel(model_path())


def gather(model: TextModel, pieces: list[list[int]], names: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and name and arguments of each call."""
    stream = TextStream(model, tool_format="json", tool_names=names)
    calls: list[tuple[str, str]] = []
    text = ""
    for delta in (*map(stream.feed, pieces), stream.flush()):
        text += delta.content
        for index, call_id, name, piece in delta.tool_calls:
            if name is not None:
                assert call_id
                assert index == len(calls)
                calls.append((name, ""))
            calls[index] = (calls[index][0], calls[index][1] + piece)
    return text, calls


def cuts(ids: list[int]) -> list[list[list[int]]]:
    chance = random.Random(7)
    places = [sorted(chance.sample(range(1, len(ids)), 3)) for _ in range(20)]
    cut = [[ids[a:b] for a, b in zip([0, *p], [*p, len(ids)], strict=True)] for p in places]
    return [[ids], [[each] for each in ids], *cut]


@pytest.mark.parametrize("layout", [{}, {"separators": (",", ":")}, {"indent": 2}, {"ensure_ascii": False}])
def test_an_array_of_calls(model: TextModel, layout: dict[str, Any]) -> None:
    calls = [{"name": f"f\u00e9{i}", "arguments": arguments} for i, arguments in enumerate(ARGUMENTS)]
    names = [str(call["name"]) for call in calls]
    for pieces in cuts(model.encode(json.dumps(calls, **layout))):
        text, gathered = gather(model, pieces, names)
        assert not text
        assert [name for name, _ in gathered] == names
        assert [json.loads(arguments) for _, arguments in gathered] == ARGUMENTS


@pytest.mark.parametrize(("arguments", "shown"), [(3, "3"), (["a", 1], '["a", 1]'), ("x } y", "x } y")])
def test_arguments_that_are_no_object(model: TextModel, arguments: Any, shown: str) -> None:
    text = json.dumps([{"name": "f", "arguments": arguments}, {"name": "g", "arguments": {}}])
    for pieces in cuts(model.encode(text)):
        assert gather(model, pieces, ["f", "g"]) == ("", [("f", shown), ("g", "{}")])


def test_arguments_cut_short(model: TextModel) -> None:
    ids = model.encode('[{"name": "f", "arguments": {"x": "a')
    assert gather(model, [ids], ["f"]) == ("", [("f", '{"x": "a')])
