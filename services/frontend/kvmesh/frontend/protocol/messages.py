"""A conversation's messages, checked, and as chat templates take them."""

from __future__ import annotations

from typing import Any, Literal

import orjson
from pydantic import Field

from kvmesh.common.errors import invalid
from kvmesh.frontend.protocol.body import Body, List, unsupported

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
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
    reasoning_content: str | None = None
    refusal: str | None = None


def template_message(place: str, message: ChatMessage) -> dict[str, Any]:
    """One message for a template; `place` is where the client has written it. Raises KvmeshError."""
    if message.role == "function":
        raise unsupported(f"{place}.role", "'function' is not supported; use tools and the role 'tool'")
    for name in ("function_call", "audio"):
        if (message.model_extra or {}).get(name):
            raise unsupported(f"{place}.{name}", "is not supported; remove it")
    # `developer` is the newer name of `system`; templates know the older one.
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    turn["content"] = _content(place, message)
    if message.role == "tool":
        if not message.tool_call_id:
            raise invalid(f"{place}.tool_call_id is required", f"{place}.tool_call_id")
        turn["tool_call_id"] = message.tool_call_id
    if message.role == "assistant":
        if message.tool_calls:
            calls = enumerate(message.tool_calls)
            turn["tool_calls"] = [_call(f"{place}.tool_calls[{i}]", call) for i, call in calls]
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
        if message.tool_calls:
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
    try:
        # Templates write objects in the model's own way.
        arguments = orjson.loads(call.function.arguments or "{}")
    except orjson.JSONDecodeError as error:
        where = f"{place}.function.arguments"
        raise invalid(f"{where} is not valid JSON: {error}", where) from None
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }
