"""Bodies of many messages, looked at in parts: whole, they would hold up all other requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from kvmesh.frontend.protocol.body import decode, validate
from kvmesh.frontend.protocol.chat import ChatCompletionRequest

# Messages that are looked at in one go, which takes a few milliseconds.
A_PART = 1_024

Request = TypeVar("Request", bound=BaseModel)


async def parse_long(kind: type[Request], raw: bytes) -> tuple[Request, list[str]]:
    """As `parse`; others run between the parts of a list of very many objects."""
    body = decode(raw)
    checked = dict(body)
    for name, value in body.items():
        if name in kind.model_fields and isinstance(value, list) and _is_long(value):
            checked[name] = await _items(kind, name, value)
    return validate(kind, checked, body)


async def conversation(body: ChatCompletionRequest) -> list[dict[str, Any]]:
    """`body.conversation` of all messages; others run between its parts."""
    turns: list[dict[str, Any]] = []
    async for start in _parts(len(body.messages)):
        turns += body.conversation(start, A_PART)
    return turns


async def _items(kind: type[BaseModel], name: str, items: list[Any]) -> list[Any]:
    """The items as objects, up to a part that has a wrong one: what is wrong is for the whole body to say."""
    checked: list[Any] = []
    async for start in _parts(len(items)):
        try:
            checked += _adapter(kind, name).validate_python(items[start : start + A_PART])
        except ValidationError:
            return checked + items[start:]
    return checked


@cache
def _adapter(kind: type[BaseModel], name: str) -> TypeAdapter[Any]:
    annotation: Any = kind.model_fields[name].annotation
    return TypeAdapter(annotation)


def _is_long(items: Sequence[Any]) -> bool:
    return len(items) > A_PART and isinstance(items[0], dict)


async def _parts(count: int) -> AsyncIterator[int]:
    """Where each begins; others run in between."""
    for start in range(0, count, A_PART):
        if start:
            await asyncio.sleep(0)
        yield start
