"""Bodies that were read as plain ones (`kvmesh.core.read_plain_request`): as validation would give them."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from kvmesh.frontend.protocol.generation import GenerationRequest, StreamOptions
from kvmesh.frontend.protocol.messages import ChatMessage

Request = TypeVar("Request", bound=GenerationRequest)
Model = TypeVar("Model", bound=BaseModel)


class PlainBody(NamedTuple):
    """The fields that were said, by name, and a completion's prompt where it is token ids."""

    fields: dict[str, Any]
    # The bytes of an array of 32-bit integers.
    tokens: bytes | None


def request_of(kind: type[Request], body: PlainBody) -> Request:
    """What `parse` makes of the same body, which it would not refuse; nothing in it is ignored."""
    fields = body.fields
    if body.tokens is not None:
        fields["prompt"] = prompt = array("I")
        prompt.frombytes(body.tokens)
    if (messages := fields.get("messages")) is not None:
        fields["messages"] = [_known(ChatMessage, message) for message in messages]
    if (options := fields.get("stream_options")) is not None:
        fields["stream_options"] = _known(StreamOptions, options)
    return _known(kind, fields)


def _known(kind: type[Model], fields: Mapping[str, Any]) -> Model:
    """As `kind.model_construct(**fields)`, which looks at every field that was not said."""
    model = kind.__new__(kind)
    put = object.__setattr__
    put(model, "__dict__", {**_defaults(kind), **fields})
    put(model, "__pydantic_fields_set__", set(fields))
    put(model, "__pydantic_extra__", {})
    put(model, "__pydantic_private__", None)
    return model


@cache
def _defaults(kind: type[BaseModel]) -> dict[str, Any]:
    """None of them is ever changed: requests are read, not written."""
    return {name: field.get_default() for name, field in kind.model_fields.items() if not field.is_required()}
