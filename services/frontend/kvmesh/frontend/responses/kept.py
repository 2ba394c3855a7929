"""Responses that are kept: asked for again, continued, deleted."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import orjson

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.frontend.responses.response import LIVE
from kvmesh.frontend.store.contract import Record, Store
from kvmesh.v1.errors_pb2 import ErrorCode

_KIND = "response"
# Responses of one conversation: each is read for the next one.
_LONGEST = 1_024
# Seconds beyond a request's own end after which nobody works at it any more.
_LOST_S = 60.0


class KeptResponse(NamedTuple):
    response: dict[str, Any]
    items: list[dict[str, Any]]
    """its own input, without that of the responses before it"""


class Kept:
    def __init__(self, store: Store, request_timeout_s: float) -> None:
        self._store = store
        self._lost_after_s = request_timeout_s + _LOST_S

    async def put(self, owner: str, response: dict[str, Any], items: list[dict[str, Any]]) -> None:
        body = orjson.dumps({"response": response, "items": items})
        parent = response["previous_response_id"] or ""
        await self._store.put(Record(_KIND, response["id"], owner, body, parent, response["created_at"]))

    async def get(self, owner: str, id: str) -> KeptResponse:
        """Raises KvmeshError(NOT_FOUND)."""
        record = await self._store.get(_KIND, owner, id)
        if record is None:
            raise _not_found(id, None)
        return self._read(record)

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
            kept = self._read(record)
            if kept.response["status"] in LIVE:
                raise invalid(f"response {record.id!r} is not finished; wait for it", "previous_response_id")
            items += [*kept.items, *kept.response["output"]]
        return items

    async def delete(self, owner: str, id: str) -> None:
        """Raises KvmeshError(NOT_FOUND)."""
        if not await self._store.delete(_KIND, owner, id):
            raise _not_found(id, None)

    def _read(self, record: Record) -> KeptResponse:
        kept = KeptResponse(**orjson.loads(record.body))
        if kept.response["status"] in LIVE and time.time() - record.created > self._lost_after_s:
            kept.response["status"] = "failed"
            kept.response["error"] = {
                "code": "server_error",
                "message": "the frontend that generated the response was lost; send the request again",
            }
        return kept


def _not_found(id: str, param: str | None) -> KvmeshError:
    return KvmeshError(
        ErrorCode.ERROR_CODE_NOT_FOUND,
        f"there is no response {id!r}; it was not stored, or has been deleted or forgotten",
        param=param,
    )
