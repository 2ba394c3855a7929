"""What is wrong with a configuration, in the words of who wrote it: the place, and the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import get_args

from pydantic import BaseModel, ValidationError

from kvmesh.common.errors import invalid


def check_sections(environment: Mapping[str, str], root: type[BaseModel]) -> None:
    """Refuse variables of sections that there are not; other names may be somebody else's.

    Raises KvmeshError(INVALID_ARGUMENT).
    """
    for name in sorted(environment):
        section, nested, _ = name.lower().removeprefix("kvmesh_").partition("__")
        if name.lower().startswith("kvmesh_") and nested and section not in root.model_fields:
            raise invalid(f"environment: {name}: {_unknown(section, section, list(root.model_fields))}")


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Every problem that `root` has found."""
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _keys_at(root, problem["loc"][:-1])
            lines.append(_unknown(place, str(problem["loc"][-1]), known))
        else:
            lines.append(f"`{place}`: {problem['msg'].lower()}")
    return "; ".join(lines)


def _unknown(place: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"unknown key `{place}`; {hint}"


def _keys_at(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    model = root
    for name in [part for part in location if isinstance(part, str)]:
        annotation = model.model_fields[name].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
