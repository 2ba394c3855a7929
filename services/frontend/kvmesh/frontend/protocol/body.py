"""A body's parsing, and the fields that are known but not supported."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.frontend.http.problems import explain_problem
from kvmesh.v1.errors_pb2 import ErrorCode

INT32_MAX = 2**31 - 1
# Lists stop at their first bad item: a body may hold millions.
Item = TypeVar("Item")
List = Annotated[list[Item], Field(fail_fast=True)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
# Of a prompt, which may be long: the gateway checks all at once, against the vocabulary.
PromptToken = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0, "maximum": INT32_MAX})]
PromptTokens = Annotated[List[PromptToken], Field(min_length=1)]


class Body(BaseModel):
    """Unknown fields are kept in `model_extra`, to be named in the answer."""

    model_config = ConfigDict(extra="allow", strict=True)


Request = TypeVar("Request", bound=BaseModel)

# Known fields that are not supported, with the values that ask for nothing special. A body that knows one
# of them declares it, and is not bound by this.
REFUSED: dict[str, tuple[Any, ...]] = {
    "prompt_logprobs": (0,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "web_search_options": (),
    "store": (False,),
    "moderation": (),
    "chat_template": (),
    # Of the other endpoint only.
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}


def parse(kind: type[Request], raw: bytes) -> tuple[Request, list[str]]:
    """Validate a body; returns it with the names of the fields that are ignored.

    Raises KvmeshError: INVALID_ARGUMENT with `param`, or UNSUPPORTED for a known field by its name.
    """
    return validate(kind, decode(raw))


def decode(raw: bytes) -> dict[str, Any]:
    """A body as it is written. Raises KvmeshError(INVALID_ARGUMENT)."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    return body


def validate(
    kind: type[Request], body: dict[str, Any], written: dict[str, Any] | None = None
) -> tuple[Request, list[str]]:
    """`parse` for a body already decoded; where parts of it are validated, too, `written` is how it came."""
    # `"kvmesh": null` is how typed clients leave it out.
    if body.get("kvmesh", ...) is None:
        del body["kvmesh"]
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise explain_problem(error, body if written is None else written) from None
    ignored = []
    for name, value in (request.model_extra or {}).items():
        if value is None:
            continue
        neutral = REFUSED.get(name)
        if neutral is None:
            ignored.append(name)
        elif not any(type(value) is type(v) and value == v for v in neutral):
            raise unsupported(name, "is not supported; remove it")
    return request, ignored


def unsupported(param: str, why: str) -> KvmeshError:
    return KvmeshError(ErrorCode.ERROR_CODE_UNSUPPORTED, f"{param} {why}", param=param)
