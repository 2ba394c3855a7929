"""Items of an input, checked, kept, and as the messages of a chat body."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.frontend.protocol.body import Body, List, unsupported
from kvmesh.frontend.serving.thoughts import unseal
from kvmesh.v1.errors_pb2 import ErrorCode

_REFUSED_PARTS = {
    "input_image": "the model takes no images",
    "input_file": "the model takes no files",
    "input_audio": "the model takes no audio",
}
# Before the notes that stand for a conversation.
_NOTES = "My notes on our conversation so far:\n"
_TEXTS = frozenset(("input_text", "output_text", "text"))


class Part(Body):
    type: str
    text: str | None = None
    refusal: str | None = None


class Item(Body):
    """Of any type; which fields it must have is checked by its type."""

    type: str | None = None
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | List[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | List[Part] | None = None
    summary: List[Part] | None = None
    encrypted_content: str | None = None


def references(given: str | list[Item] | None) -> list[str]:
    """Ids of the items that are named instead of given."""
    return [item.id for item in given or () if isinstance(item, Item) and _is_reference(item) and item.id]


def checked_items(given: str | list[Item] | None, kept: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """As they are kept and listed: all fields spelled out, and `kept` ones, by id, in place of references.
    Raises KvmeshError for what is not served, or not kept."""
    if isinstance(given, str):
        given = [Item(role="user", content=given)]
    checked = []
    for i, item in enumerate(given or ()):
        place = f"input[{i}]"
        checked.append(_kept(place, item, kept) if _is_reference(item) else _checked(place, item))
    return checked


def chat_messages(instructions: str, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`items`: checked, or an answer's own. Calls belong to the assistant's message before them, and what it
    has thought to the one after."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    speaks, thought = False, ""
    for item in items:
        kind = item["type"]
        if kind == "reasoning":
            thought += _thought(item)
            continue
        speech = kind == "function_call" or (kind == "message" and item["role"] == "assistant")
        if kind == "message":
            messages.append({"role": item["role"], "content": "".join(map(_spelled, item["content"]))})
            speaks = speech
        elif kind == "function_call":
            if not speaks:
                messages.append({"role": "assistant", "content": None})
                speaks = True
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "compaction":
            messages.append(
                {"role": "assistant", "content": _NOTES + (unseal(item["encrypted_content"]) or "")}
            )
            speaks = False
        elif kind == "function_call_output":
            output = item["output"]
            text = output if isinstance(output, str) else "".join(map(_spelled, output))
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
            speaks = False
        if speech and thought:
            messages[-1]["reasoning_content"] = messages[-1].get("reasoning_content", "") + thought
        thought = ""
    return messages


def new_id(kind: str) -> str:
    """`kind`: msg, fc, resp, ..."""
    return f"{kind}_{uuid.uuid4().hex}"


def _is_reference(item: Item) -> bool:
    return item.type == "item_reference" or (item.type is None and item.id is not None and not item.role)


def _kept(place: str, item: Item, kept: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    if not item.id:
        raise invalid(f"{place}.id is required", f"{place}.id")
    if item.id not in kept:
        raise KvmeshError(
            ErrorCode.ERROR_CODE_NOT_FOUND,
            f"there is no item {item.id!r}; its response was not stored, or has been deleted or forgotten: "
            "send the item itself",
            param=f"{place}.id",
        )
    return kept[item.id]


def _checked(place: str, item: Item) -> dict[str, Any]:
    kind = item.type or "message"
    if kind == "message":
        if item.role is None:
            raise invalid(f"{place}.role is required", f"{place}.role")
        written = "output_text" if item.role == "assistant" else "input_text"
        content = _parts(f"{place}.content", item.content, written)
        identity = {"id": item.id or new_id("msg"), "type": kind, "role": item.role}
        return {**identity, "status": "completed", "content": content}
    if kind == "function_call":
        if not item.call_id or not item.name or item.arguments is None:
            raise invalid(f"{place} needs a call_id, a name and arguments", place)
        identity = {"id": item.id or new_id("fc"), "type": kind, "call_id": item.call_id}
        return {**identity, "status": "completed", "name": item.name, "arguments": item.arguments}
    if kind == "function_call_output":
        if not item.call_id:
            raise invalid(f"{place}.call_id is required", f"{place}.call_id")
        output = item.output
        if not isinstance(output, str):
            output = _parts(f"{place}.output", output, "input_text")
        identity = {"id": item.id or new_id("fco"), "type": kind, "call_id": item.call_id}
        return {**identity, "status": "completed", "output": output}
    if kind == "reasoning":
        return _reasoning(place, item)
    if kind == "compaction":
        where = f"{place}.encrypted_content"
        if unseal(item.encrypted_content or "") is None:
            raise invalid(f"{where} must be as /v1/responses/compact has answered it", where)
        return {"id": item.id or new_id("cmp"), "type": kind, "encrypted_content": item.encrypted_content}
    raise unsupported(f"{place}.type", f"{kind!r} is not supported; use messages and function calls")


def _reasoning(place: str, item: Item) -> dict[str, Any]:
    if isinstance(item.content, str):
        raise invalid(f"{place}.content must be a list of parts", f"{place}.content")
    checked: dict[str, Any] = {"id": item.id or new_id("rs"), "type": "reasoning", "summary": []}
    for name, parts in (("summary", item.summary), ("content", item.content)):
        for i, part in enumerate(parts or ()):
            if part.text is None:
                raise invalid(f"{place}.{name}[{i}].text is required", f"{place}.{name}[{i}].text")
            written = "summary_text" if name == "summary" else "reasoning_text"
            checked.setdefault(name, []).append({"type": written, "text": part.text})
    if item.encrypted_content is not None:
        checked["encrypted_content"] = item.encrypted_content
    return checked


def _thought(item: dict[str, Any]) -> str:
    """Templates know which of a conversation's thoughts the model is shown again."""
    written = "".join(part["text"] for part in item.get("content") or ())
    return written or unseal(item.get("encrypted_content") or "") or ""


def _parts(place: str, content: str | list[Part] | None, written: str) -> list[dict[str, Any]]:
    if content is None:
        raise invalid(f"{place} must be text", place)
    parts = [Part(type=written, text=content)] if isinstance(content, str) else content
    checked = []
    for i, part in enumerate(parts):
        if part.type == "refusal" and part.refusal is not None:
            checked.append({"type": "refusal", "refusal": part.refusal})
            continue
        if part.type not in _TEXTS:
            why = _REFUSED_PARTS.get(part.type, "the model takes text only")
            raise unsupported(f"{place}[{i}].type", f"{part.type!r} is not supported: {why}")
        if part.text is None:
            raise invalid(f"{place}[{i}].text is required", f"{place}[{i}].text")
        more = {"annotations": []} if written == "output_text" else {}
        checked.append({"type": written, "text": part.text, **more})
    return checked


def _spelled(part: dict[str, Any]) -> str:
    return part["refusal"] if part["type"] == "refusal" else part["text"]
