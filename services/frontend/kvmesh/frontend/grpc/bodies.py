"""gRPC requests as the bodies REST takes, so that the same rules hold, and REST's errors in gRPC's words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import orjson
from google.protobuf.message import Message
from pydantic import BaseModel

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.frontend.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    validate,
)
from kvmesh.v1.engine_pb2 import SamplingParams
from kvmesh.v1.frontend_pb2 import (
    ChatMessage,
    ChatRequest,
    CompleteRequest,
    EmbedRequest,
    Prompt,
    RequestOptions,
)

_CONSTRAINTS = ("json_schema", "regex", "ebnf", "structural_tag")
# REST's fields -> SamplingParams', where the name differs.
_SAMPLING = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "logprobs": "top_logprobs",
    **{kind: f"constraint.{kind}" for kind in _CONSTRAINTS},
}
_REST = {name: rest for rest, name in _SAMPLING.items()}
# REST's fields that are one or several -> the proto's, always several.
_LISTS = {"prompt": "prompts", "input": "inputs"}
_ALLOWED = "tool_choice.allowed_tools.tools"
_OPTIONS = ("policy", "session_id", "tenant", "priority", "returns", "returns_in_s", "deadline_ms")

Request = TypeVar("Request", bound=BaseModel)


def chat_body(request: ChatRequest) -> ChatCompletionRequest:
    """Raises KvmeshError that names the field as the proto does."""
    sampling = sampling_body(request.sampling)
    top = sampling.pop("logprobs", None)
    fields = {
        "model": request.model or "default",
        "messages": [_message(message) for message in request.messages],
        "n": request.n,
        "stop": list(request.stop),
        "user": request.user,
        "store": request.store,
        "metadata": dict(request.metadata),
        "tools": [
            {
                "type": "function",
                "function": _given(
                    name=tool.name,
                    description=tool.description,
                    parameters=_json(f"tools[{i}].parameters", tool.parameters),
                    strict=tool.strict,
                ),
            }
            for i, tool in enumerate(request.tools)
        ],
        "tool_choice": _tool_choice(request),
        "continue_final_message": request.continue_final_message,
        "reasoning_effort": request.reasoning_effort,
        "verbosity": request.verbosity,
        "chat_template_kwargs": _json("chat_template_kwargs", request.chat_template_kwargs),
    }
    fields = _given(**fields) | sampling | _options(request.options)
    fields |= _present(request, "parallel_tool_calls", "add_generation_prompt")
    if top is not None:
        fields |= {"logprobs": True, "top_logprobs": top}
    fields.setdefault("messages", [])
    return _validate(ChatCompletionRequest, fields, request.explain)


def completion_body(request: CompleteRequest) -> CompletionRequest:
    """Raises KvmeshError that names the field as the proto does."""
    prompts = _prompts("prompts", request.prompts)
    fields = _given(
        model=request.model or "default",
        n=request.n,
        stop=list(request.stop),
        user=request.user,
        echo=request.echo,
        suffix=request.suffix,
    )
    fields |= sampling_body(request.sampling) | _options(request.options) | {"prompt": prompts}
    return _validate(CompletionRequest, fields, request.explain)


def embedding_body(request: EmbedRequest) -> EmbeddingRequest:
    """Raises KvmeshError that names the field as the proto does."""
    fields = _given(
        model=request.model or "default",
        input=_prompts("inputs", request.inputs),
        dimensions=request.dimensions,
        user=request.user,
    )
    return _validate(EmbeddingRequest, fields | _options(request.options), False)


def _tool_choice(request: ChatRequest) -> Any:
    choice = request.tool_choice
    if request.allowed_tools:
        if request.tool_name or choice not in ("", "auto", "required"):
            raise invalid("allowed_tools needs a tool_choice of auto or required", "allowed_tools")
        tools = [_named_tool(name) for name in request.allowed_tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice or "auto", "tools": tools}}
    return _named_tool(request.tool_name) if request.tool_name else choice


def _named_tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _prompts(name: str, given: Sequence[Prompt]) -> list[str | list[int]]:
    if not given:
        raise invalid(f"{name} must not be empty", name)
    kinds = {prompt.WhichOneof("kind") for prompt in given}
    if len(kinds) > 1 or None in kinds:
        raise invalid(f"{name} must be all text or all token ids", name)
    text = kinds == {"text"}
    return [prompt.text if text else list(prompt.tokens.ids) for prompt in given]


def tokens_body(
    token_ids: list[int], model: str, sampling: SamplingParams, options: RequestOptions, explain: bool
) -> CompletionRequest:
    """A prompt in token ids. Raises KvmeshError that names the field as the proto does."""
    if not token_ids:
        raise invalid("token_ids must not be empty", "token_ids")
    fields = sampling_body(sampling) | _options(options)
    fields |= {"model": model or "default", "prompt": [token_ids]}
    return _validate(CompletionRequest, fields, explain)


def sampling_body(given: SamplingParams) -> dict[str, Any]:
    """REST's fields for the parameters that are set."""
    fields: dict[str, Any] = {}
    for field, value in given.ListFields():
        name = _REST.get(field.name, field.name)
        if name == "constraint":
            if kind := value.WhichOneof("kind"):
                fields[kind] = getattr(value, kind)
        elif name == "logit_bias":
            fields[name] = {str(token): bias for token, bias in value.items()}
        elif name == "stop_token_ids":
            fields[name] = list(value)
        elif name == "prompt_logprobs":
            # REST has `echo` for it; asked for by itself where token ids are answered.
            continue
        else:
            fields[name] = value
    return fields


@contextmanager
def proto_names() -> Iterator[None]:
    """Around whatever raises errors with REST's names."""
    try:
        yield
    except KvmeshError as error:
        rest = error.param or ""
        name = _proto_name(rest)
        if name != rest:
            error.message = error.message.replace(rest, name, 1)
            error.param = name
        raise


def _proto_name(rest: str) -> str:
    if rest.startswith("kvmesh."):
        return f"options.{rest.removeprefix('kvmesh.')}"
    if rest.startswith(("tools[", _ALLOWED)):
        return rest.replace(_ALLOWED, "allowed_tools").replace(".function", "", 1)
    head = rest.partition(".")[0].partition("[")[0]
    if head in _LISTS:
        return f"{_LISTS[head]}{rest[len(head) :]}"
    if head in SamplingParams.DESCRIPTOR.fields_by_name or head in _SAMPLING:
        return f"sampling.{_SAMPLING.get(head, head)}{rest[len(head) :]}"
    if head in RequestOptions.DESCRIPTOR.fields_by_name:
        return f"options.{rest}"
    return rest


def _validate(kind: type[Request], fields: dict[str, Any], explain: bool) -> Request:
    fields["kvmesh"] = {**fields.get("kvmesh", {}), "explain": explain}
    request, _ = validate(kind, fields)
    return request


def _options(options: RequestOptions) -> dict[str, Any]:
    own = {field.name: value for field, value in options.ListFields()}
    return {
        "kvmesh": {name: own[name] for name in _OPTIONS if name in own},
        **{name: value for name, value in own.items() if name not in _OPTIONS},
    }


def _message(message: ChatMessage) -> dict[str, Any]:
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    optional = _given(
        name=message.name,
        tool_calls=calls,
        tool_call_id=message.tool_call_id,
        reasoning_content=message.reasoning_content,
    )
    content = message.content or (None if calls else "")
    return {"role": message.role, "content": content, **optional}


def _given(**fields: Any) -> dict[str, Any]:
    """Those that are set: in proto3 the others are empty."""
    return {name: value for name, value in fields.items() if value or value == {}}


def _present(message: Message, *names: str) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _json(place: str, text: str) -> Any:
    if not text:
        return None
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise invalid(f"{place} is not valid JSON: {error}", place) from None
