"""Chat completions that are kept because their client asked for it: listed, read, labelled, deleted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.protocol import ChatCompletionRequest
from kvmesh.frontend.store.contract import Record, Store
from kvmesh.v1.errors_pb2 import ErrorCode

_KIND = "chat"
# What the body asked for, as far as a stored completion shows it.
_SHOWN = {
    "frequency_penalty",
    "presence_penalty",
    "response_format",
    "seed",
    "temperature",
    "tool_choice",
    "tools",
    "top_p",
}


class ChatPage(NamedTuple):
    completions: list[dict[str, Any]]
    more: bool
    """whether others follow"""


class StoredChats:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def put(
        self, owner: str, body: ChatCompletionRequest, request_id: str, completion: dict[str, Any]
    ) -> None:
        """Keep a completion, as its client is told it, and the messages it answers. Raises KvmeshError."""
        asked = body.model_dump(include=_SHOWN, exclude_none=True, by_alias=True)
        kept = {
            **completion,
            "request_id": request_id,
            "input_user": body.user,
            **dict.fromkeys(sorted(_SHOWN)),
            **asked,
            "metadata": body.metadata or {},
        }
        messages = [message.model_dump(exclude_unset=True) for message in body.messages]
        # Finer than the completion's own second: lists have an order.
        await self._store.put(_record(owner, kept, messages, time.time()))

    async def get(self, owner: str, id: str) -> dict[str, Any]:
        """The completion. Raises KvmeshError(NOT_FOUND)."""
        return (await self._read(owner, id))["completion"]

    async def messages(self, owner: str, id: str) -> list[dict[str, Any]]:
        """Those it answers, each with an id. Raises KvmeshError(NOT_FOUND)."""
        kept = await self._read(owner, id)
        return [_message(f"{id}-{i}", message) for i, message in enumerate(kept["messages"])]

    async def update(self, owner: str, id: str, metadata: dict[str, str]) -> dict[str, Any]:
        """Put other labels on it; returns the completion. Raises KvmeshError(NOT_FOUND)."""
        kept = await self._read(owner, id)
        completion = {**kept["completion"], "metadata": metadata}
        # It may have been deleted since it was read, and stays so.
        if not await self._store.replace(_record(owner, completion, kept["messages"], kept["created"])):
            raise _not_found(id)
        return completion

    async def delete(self, owner: str, id: str) -> None:
        """Raises KvmeshError(NOT_FOUND)."""
        if not await self._store.delete(_KIND, owner, id):
            raise _not_found(id)

    async def page(
        self,
        owner: str,
        model: str,
        metadata: Mapping[str, str],
        after: str,
        limit: int,
        *,
        newest_first: bool,
    ) -> ChatPage:
        """Those of a model, unless it is empty, that have all of `metadata`. Raises KvmeshError."""
        labels = _labels(model, metadata)
        page = await self._store.page(_KIND, owner, labels, after, limit, newest_first=newest_first)
        return ChatPage([orjson.loads(record.body)["completion"] for record in page.records], page.more)

    async def _read(self, owner: str, id: str) -> dict[str, Any]:
        record = await self._store.get(_KIND, owner, id)
        if record is None:
            raise _not_found(id)
        return {**orjson.loads(record.body), "created": record.created}


def _record(owner: str, completion: dict[str, Any], messages: list[dict[str, Any]], created: float) -> Record:
    body = orjson.dumps({"completion": completion, "messages": messages})
    labels = _labels(completion["model"], completion["metadata"])
    return Record(_KIND, completion["id"], owner, body, created=created, labels=labels)


def _labels(model: str, metadata: Mapping[str, str]) -> dict[str, str]:
    labels = {f"metadata.{name}": value for name, value in metadata.items()}
    return {"model": model, **labels} if model else labels


def _message(id: str, message: dict[str, Any]) -> dict[str, Any]:
    content, parts = message.get("content"), None
    if isinstance(content, list):
        parts, content = content, "".join(part.get("text") or "" for part in content)
    return {
        "id": id,
        "name": None,
        "refusal": None,
        **message,
        "content": content,
        "content_parts": parts,
    }


def _not_found(id: str) -> KvmeshError:
    return KvmeshError(
        ErrorCode.ERROR_CODE_NOT_FOUND,
        f"there is no stored chat completion {id!r}; it was not asked for with `store`, or has been deleted "
        "or forgotten",
    )
