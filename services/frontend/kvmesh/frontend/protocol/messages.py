"""A conversation's messages, checked, and as chat templates take them."""

from __future__ import annotations

from typing import Any, Literal

import orjson
from pydantic import Field

from kvmesh.common.errors import invalid
from kvmesh.frontend.protocol.body import Body, List, unsupported

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
# Templates know the older name of the first and the newer of the second.
_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}
# What a message may carry beside its content, and what it asks for that is not served.
_REFUSED_PARTS = {
    "image_url": "the model takes no images",
    "input_image": "the model takes no images",
    "input_audio": "the model takes no audio",
    "audio_url": "the model takes no audio",
    "video_url": "the model takes no video",
    "file": "the model takes no files",
}


class ContentPart(Body):
    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Body):
    name: str = Field(min_length=1)
    arguments: str


class ToolCall(Body):
    id: str = Field(min_length=1)
    type: str = "function"
    function: CalledFunction | None = None


class ChatMessage(Body):
    role: Role
    content: str | List[ContentPart] | None = None
    name: str | None = None
    tool_calls: List[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    """the former spelling of `tool_calls`; the role `function` is that of `tool`"""
    reasoning_content: str | None = None
    refusal: str | None = None


def template_message(place: str, message: ChatMessage) -> dict[str, Any]:
    """One message for a template; `place` is where the client has written it. Raises KvmeshError."""
    if (message.model_extra or {}).get("audio"):
        raise unsupported(f"{place}.audio", "is not supported; remove it")
    turn: dict[str, Any] = {"role": _TEMPLATE_ROLES.get(message.role, message.role)}
    turn["content"] = _content(place, message)
    if message.role == "tool":
        if not message.tool_call_id:
            raise invalid(f"{place}.tool_call_id is required", f"{place}.tool_call_id")
        turn["tool_call_id"] = message.tool_call_id
    if message.role == "function":
        if not message.name:
            raise invalid(f"{place}.name is required", f"{place}.name")
        turn["tool_call_id"] = _former_id(message.name)
    if message.role == "assistant":
        if message.tool_calls:
            calls = enumerate(message.tool_calls)
            turn["tool_calls"] = [_call(f"{place}.tool_calls[{i}]", call) for i, call in calls]
        elif called := message.function_call:
            turn["tool_calls"] = [_called(_former_id(called.name), called)]
        if message.reasoning_content:
            turn["reasoning_content"] = message.reasoning_content
    if message.name:
        turn["name"] = message.name
    return turn


def _content(place: str, message: ChatMessage) -> str:
    content = message.content
    if content is None and message.role == "assistant":
        # What it said instead.
        if message.refusal is not None:
            return message.refusal
        if message.tool_calls or message.function_call:
            # Many templates take a string for granted.
            return ""
    if content is None:
        raise invalid(f"{place}.content must be text", f"{place}.content")
    if isinstance(content, str):
        return content
    return "".join(_text(f"{place}.content[{j}]", part) for j, part in enumerate(content))


def _text(place: str, part: ContentPart) -> str:
    if part.type == "refusal" and part.refusal is not None:
        return part.refusal
    if part.type != "text":
        why = _REFUSED_PARTS.get(part.type, "the model takes text only")
        raise unsupported(f"{place}.type", f"{part.type!r} is not supported: {why}")
    if part.text is None:
        raise invalid(f"{place}.text is required", f"{place}.text")
    return part.text


def _call(place: str, call: ToolCall) -> dict[str, Any]:
    if call.type != "function":
        raise unsupported(f"{place}.type", f"{call.type!r} is not supported; use 'function'")
    if call.function is None:
        raise invalid(f"{place}.function is required", f"{place}.function")
    return _called(call.id, call.function)


def _called(id: str, function: CalledFunction) -> dict[str, Any]:
    # Templates write objects in the model's own way.
    arguments = read_arguments(function.arguments)
    return {"id": id, "type": "function", "function": {"name": function.name, "arguments": arguments}}


def read_arguments(text: str) -> Any:
    """A call's arguments; what is no JSON, as where length cuts a call, is kept in a field of its own."""
    try:
        return orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        return {"partial_json": text}


def _former_id(name: str) -> str:
    """Of a call without one: results follow their calls, and name the function."""
    return f"call_{name}"
