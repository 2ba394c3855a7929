"""Validation errors in the client's words: the field at fault as it stands in its request."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kvmesh.common.errors import KvmeshError, invalid

_WORDS = {
    "missing": "is required",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "extra_forbidden": "is not a known field; remove it",
}


def explain_problem(error: ValidationError, body: dict[str, Any]) -> KvmeshError:
    """The first problem of `body` as one INVALID_ARGUMENT error with its `param`."""
    # Of a union's alternatives the one that got furthest into the body meant what the client meant.
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]["loc"][0]
    found = max((p for p in problems if p["loc"][0] == first), key=lambda p: len(_place(p, body)))
    place = _place(found, body)
    # Alternatives at the same place: say what each wants, unless one of them took the type.
    same = [p for p in problems if _place(p, body) == place]
    same = [p for p in same if not p["type"].endswith("_type")] or same
    words = dict.fromkeys(_WORDS.get(p["type"]) or _sentence(p["msg"]) for p in same)
    param = _spell(place)
    return invalid(f"{param} {' or '.join(words)}", param)


def _sentence(message: str) -> str:
    """Pydantic's "Input should be a valid number" as the end of a sentence about the field."""
    for subject in ("Input ", "String ", "List ", "Dictionary "):
        message = message.removeprefix(subject)
    return message[:1].lower() + message[1:]


def _place(problem: ErrorDetails, body: Any) -> tuple[int | str, ...]:
    """Where the problem is, without the names pydantic gives to a union's alternatives."""
    place: list[int | str] = []
    here = body
    for part in problem["loc"]:
        if isinstance(here, dict) and part in here:
            here = here[str(part)]
        elif isinstance(here, list) and isinstance(part, int):
            here = here[part]
        elif not (problem["type"] == "missing" and part is problem["loc"][-1]):
            continue
        place.append(part)
    return tuple(place)


def _spell(place: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") as messages[0].role."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
