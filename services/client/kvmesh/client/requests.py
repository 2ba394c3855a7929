"""The stubs' requests from plain Python values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvmesh.v1.engine_pb2 import SamplingParams
from kvmesh.v1.frontend_pb2 import (
    ChatMessage,
    ChatRequest,
    CompleteRequest,
    EmbedRequest,
    Prompt,
    TokenIds,
)

Input = str | Sequence[int]
"""text, or token ids"""
Message = Mapping[str, Any] | ChatMessage

_SAMPLING = frozenset(SamplingParams.DESCRIPTOR.fields_by_name)


def chat_request(model: str, messages: Iterable[Message], fields: dict[str, Any]) -> ChatRequest:
    """`fields`: those of ChatRequest and of SamplingParams, by name. Raises ValueError for others."""
    turns = [m if isinstance(m, ChatMessage) else ChatMessage(**m) for m in messages]
    return ChatRequest(model=model, messages=turns, **_sorted(fields))


def complete_request(model: str, prompts: Input | Sequence[Input], fields: dict[str, Any]) -> CompleteRequest:
    """`fields`: those of CompleteRequest and of SamplingParams, by name. Raises ValueError for others."""
    return CompleteRequest(model=model, prompts=_prompts(prompts), **_sorted(fields))


def embed_request(model: str, inputs: Input | Sequence[Input], dimensions: int) -> EmbedRequest:
    return EmbedRequest(model=model, inputs=_prompts(inputs), dimensions=dimensions)


def _sorted(fields: dict[str, Any]) -> dict[str, Any]:
    """Sampling's fields into their message."""
    sampling = {name: value for name, value in fields.items() if name in _SAMPLING}
    rest = {name: value for name, value in fields.items() if name not in _SAMPLING}
    return {"sampling": SamplingParams(**sampling), **rest}


def _prompts(given: Input | Sequence[Input]) -> list[Prompt]:
    several = given if not isinstance(given, str) and not (given and isinstance(given[0], int)) else [given]
    return [
        Prompt(text=one) if isinstance(one, str) else Prompt(tokens=TokenIds(ids=one))  # type: ignore[arg-type]
        for one in several
    ]
