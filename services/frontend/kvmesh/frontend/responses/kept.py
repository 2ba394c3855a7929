"""Responses that are kept: asked for again, continued, deleted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.frontend.responses.response import LIVE
from kvmesh.frontend.store.contract import Record, Store
from kvmesh.frontend.store.journal import Journal, Seen
from kvmesh.v1.errors_pb2 import ErrorCode

_KIND = "response"
# Responses of one conversation: each is read for the next one. So many items may be named, too.
_LONGEST = 1_024
# Before an item's id, in the label that its response is found by.
_ITEM = "item."
# Seconds without a report after which the frontend that generates a response is held to be gone.
_LOST_S = 15.0


class KeptResponse(NamedTuple):
    response: dict[str, Any]
    items: list[dict[str, Any]]
    """its own input, without that of the responses before it"""


def lost(seen: Seen | None) -> bool:
    """Whether nobody will go on with a response that is not at its end."""
    return seen is None or seen.closed or seen.silent_s > _LOST_S


class Kept:
    def __init__(self, store: Store, journal: Journal) -> None:
        self._store = store
        self._journal = journal

    async def put(self, owner: str, response: dict[str, Any], items: list[dict[str, Any]]) -> Record:
        record = _record(owner, response, items)
        await self._store.put(record)
        return record

    async def finish(self, begun: Record, response: dict[str, Any], items: list[dict[str, Any]]) -> None:
        """`put` in place of what was `begun`. One that has been deleted, or held to be lost, stays so."""
        await self._store.replace(_record(begun.owner, response, items), begun.body)

    async def get(self, owner: str, id: str) -> KeptResponse:
        """Raises KvmeshError(NOT_FOUND)."""
        kept = _read(await self._record(owner, id))
        if kept.response["status"] not in LIVE:
            return kept
        seen = await self._journal.read(id)
        # Again: it is stored before its end is reported.
        record = await self._record(owner, id)
        kept = _read(record)
        if kept.response["status"] not in LIVE:
            return kept
        if seen is None or lost(seen):
            kept.response["status"] = "failed"
            kept.response["error"] = {
                "code": "server_error",
                "message": "the frontend that generated the response was lost; send the request again",
            }
            await self.finish(record, kept.response, kept.items)
        else:
            kept.response["status"] = seen.status if seen.status in LIVE else "in_progress"
        return kept

    async def history(self, owner: str, id: str) -> list[dict[str, Any]]:
        """Inputs and outputs of a response and of those it continues, in their order."""
        try:
            records = await self._store.chain(_KIND, owner, id, _LONGEST)
        except KvmeshError as error:
            error.param = error.param or "previous_response_id"
            raise
        if not records:
            raise _not_found(id, "previous_response_id")
        items: list[dict[str, Any]] = []
        for record in records:
            kept = _read(record)
            if kept.response["status"] in LIVE:
                kept = await self.get(owner, record.id)
            if kept.response["status"] in LIVE:
                raise invalid(f"response {record.id!r} is not finished; wait for it", "previous_response_id")
            items += [*kept.items, *kept.response["output"]]
        return items

    async def items(self, owner: str, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Those of these items that are kept with some response, as its input or output, by id."""
        if len(ids) > _LONGEST:
            raise invalid(f"input names more than {_LONGEST} items; send the items themselves", "input")
        found: dict[str, dict[str, Any]] = {}
        for record in await self._store.labelled(_KIND, owner, [f"{_ITEM}{id}" for id in ids]):
            kept = _read(record)
            found |= {item["id"]: item for item in (*kept.items, *kept.response["output"])}
        return found

    async def delete(self, owner: str, id: str) -> None:
        """Raises KvmeshError(NOT_FOUND)."""
        if not await self._store.delete(_KIND, owner, id):
            raise _not_found(id, None)

    async def _record(self, owner: str, id: str) -> Record:
        record = await self._store.get(_KIND, owner, id)
        if record is None:
            raise _not_found(id, None)
        return record


def _record(owner: str, response: dict[str, Any], items: list[dict[str, Any]]) -> Record:
    body = orjson.dumps({"response": response, "items": items})
    parent = response["previous_response_id"] or ""
    labels = {f"{_ITEM}{item['id']}": "" for item in (*items, *response["output"])}
    return Record(_KIND, response["id"], owner, body, parent, response["created_at"], labels)


def _read(record: Record) -> KeptResponse:
    return KeptResponse(**orjson.loads(record.body))


def _not_found(id: str, param: str | None) -> KvmeshError:
    return KvmeshError(
        ErrorCode.ERROR_CODE_NOT_FOUND,
        f"there is no response {id!r}; it was not stored, or has been deleted or forgotten",
        param=param,
    )
