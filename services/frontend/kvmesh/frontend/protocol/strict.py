"""Calls that a model makes of itself, held to the schemas of the functions that are `strict`.

The answer is free until it begins a call in the model's own format; from there to the call's end it is one of
the functions', by its schema: an XGrammar structural tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from kvmesh.frontend.protocol.constraints import Named, tag_constraint
from kvmesh.frontend.protocol.tools import ANY_OBJECT, Function


class _Frame(NamedTuple):
    """What stands around a call's arguments; `trigger` begins `before`."""

    trigger: str
    before: str
    after: str


# Of the formats whose calls begin with a mark that is text: as their templates show a call to the model.
_HERMES = _Frame("<tool_call>", '<tool_call>\n{"name": "%s", "arguments": ', "}\n</tool_call>")
_FRAMES: dict[str, _Frame] = dict.fromkeys(("hermes", "qwen", "qwen25", "qwen3"), _HERMES)


def strict_calls(functions: Sequence[Function], tool_format: str | None, param: str) -> Named | None:
    """The constraint, of all of them; functions that are not strict take any object. None: the format's calls
    cannot be held to anything. Raises KvmeshError for schemas that cannot be right."""
    frame = _FRAMES.get(tool_format or "")
    if frame is None:
        return None
    structures = [
        {"begin": frame.before % function.name, "schema": _schema(function), "end": frame.after}
        for function in functions
    ]
    tag = {"type": "structural_tag", "structures": structures, "triggers": [frame.trigger]}
    return tag_constraint(orjson.dumps(tag).decode(), param)


def _schema(function: Function) -> dict[str, Any]:
    return (function.parameters if function.strict else None) or ANY_OBJECT
