"""Anthropic's turns and blocks as the messages of a chat body."""

from __future__ import annotations

from typing import Any, Literal

import orjson

from kvmesh.common.errors import invalid
from kvmesh.frontend.protocol.body import Body, List, unsupported
from kvmesh.frontend.serving.thoughts import unseal

_REFUSED_BLOCKS = {
    "image": "the model takes no images",
    "document": "the model takes no documents",
    "search_result": "the model takes text only",
    "container_upload": "the model takes no files",
}
# Between blocks of one turn, which are paragraphs rather than pieces of a sentence.
_BETWEEN = "\n"


class Part(Body):
    """What a tool's result is made of."""

    type: str
    text: str | None = None


class Block(Part):
    """Of any type; which fields it must have is checked by its type."""

    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | List[Part] | None = None
    is_error: bool | None = None
    thinking: str | None = None
    signature: str | None = None


class Turn(Body):
    role: Literal["user", "assistant", "system"]
    content: str | List[Block]


def system_text(system: str | list[Block] | None) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    return _BETWEEN.join(_text(f"system[{i}]", block) for i, block in enumerate(system))


def chat_messages(system: str, turns: list[Turn]) -> list[dict[str, Any]]:
    """Turns of one role in a row are one. Raises KvmeshError for blocks that are not served, and for results
    that answer no call of the turn before."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    open_calls: set[str] = set()
    for i, turn in enumerate(turns):
        place = f"messages[{i}]"
        content = turn.content
        blocks = [Block(type="text", text=content)] if isinstance(content, str) else content
        if not blocks:
            raise invalid(f"{place}.content must not be empty", f"{place}.content")
        if turn.role == "system":
            messages.append({"role": "system", "content": system_text(blocks)})
        elif turn.role == "user":
            _user(place, blocks, messages, open_calls)
        else:
            _check_answered(place, open_calls)
            _assistant(place, blocks, messages, open_calls)
    _check_answered(f"messages[{len(turns) - 1}]", open_calls)
    return messages


def _user(place: str, blocks: list[Block], messages: list[dict[str, Any]], open_calls: set[str]) -> None:
    for j, block in enumerate(blocks):
        where = f"{place}.content[{j}]"
        if block.type == "tool_result":
            if block.tool_use_id not in open_calls:
                raise invalid(
                    f"{where}.tool_use_id must be the id of a tool_use block in the turn before",
                    f"{where}.tool_use_id",
                )
            open_calls.discard(block.tool_use_id)
            result = _result(where, block)
            messages.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result})
            continue
        text = _text(where, block)
        if _speaks(messages, "user"):
            messages[-1]["content"] += _BETWEEN + text
        else:
            messages.append({"role": "user", "content": text})
    _check_answered(place, open_calls)


def _assistant(place: str, blocks: list[Block], messages: list[dict[str, Any]], open_calls: set[str]) -> None:
    if not _speaks(messages, "assistant"):
        messages.append({"role": "assistant", "content": None})
    message = messages[-1]
    for j, block in enumerate(blocks):
        where = f"{place}.content[{j}]"
        if block.type == "tool_use":
            if not block.id or not block.name or block.input is None:
                raise invalid(f"{where} needs an id, a name and an input", where)
            open_calls.add(block.id)
            function = {"name": block.name, "arguments": orjson.dumps(block.input).decode()}
            call = {"id": block.id, "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        elif block.type == "thinking":
            thought = block.thinking or unseal(block.signature or "") or ""
            message["reasoning_content"] = message.get("reasoning_content", "") + thought
        elif block.type != "redacted_thinking":
            text, before = _text(where, block), message["content"]
            message["content"] = text if before is None else before + _BETWEEN + text
    if message["content"] is None and not message.get("tool_calls"):
        # It has only thought.
        message["content"] = ""


def _speaks(messages: list[dict[str, Any]], role: str) -> bool:
    return bool(messages) and messages[-1]["role"] == role


def _check_answered(place: str, open_calls: set[str]) -> None:
    if open_calls:
        raise invalid(
            f"{place} must have a tool_result block for every tool_use of the turn before; "
            f"{sorted(open_calls)[0]!r} has none",
            f"{place}.content",
        )


def _result(place: str, block: Block) -> str:
    content = block.content
    if isinstance(content, list):
        content = _BETWEEN.join(_text(f"{place}.content[{j}]", part) for j, part in enumerate(content))
    # Templates have no other way to say so.
    return f"Error: {content or ''}" if block.is_error else content or ""


def _text(place: str, block: Part) -> str:
    if block.type != "text":
        why = _REFUSED_BLOCKS.get(block.type, "it cannot stand here, or the model cannot take it")
        raise unsupported(f"{place}.type", f"{block.type!r} is not supported: {why}")
    if block.text is None:
        raise invalid(f"{place}.text is required", f"{place}.text")
    return block.text
