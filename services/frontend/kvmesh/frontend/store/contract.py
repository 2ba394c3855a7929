"""What a store of answers promises. A record is bytes with an owner; what they mean is its kind's affair."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Record:
    kind: str
    """a noun, e.g. `response`; ids are unique within a kind"""
    id: str
    owner: str
    """the tenant whose it is; empty: nobody's. To all others it does not exist"""
    body: bytes
    parent: str = ""
    """id of the record of the same kind and owner that this one continues; empty: none"""
    created: float = field(default_factory=time.time)
    """Unix time"""


class Store(Protocol):
    """Bounded by age since one was last put, read or continued, and by bytes; the longest unused go first.

    Nothing here blocks the event loop. Everything raises KvmeshError(UNAVAILABLE) where the medium fails;
    nothing is changed then.
    """

    async def put(self, record: Record) -> None:
        """Keep a record, in place of the one of the same kind and id. A record larger than the store may be
        is refused: KvmeshError(PAYLOAD_TOO_LARGE)."""
        ...

    async def chain(self, kind: str, owner: str, id: str, most: int) -> list[Record]:
        """The record and those it continues, the oldest first. Empty where it is not there.

        Raises KvmeshError(NOT_FOUND) where one of those it continues is gone, INVALID_ARGUMENT for
        more than `most`.
        """
        ...

    async def get(self, kind: str, owner: str, id: str) -> Record | None: ...

    async def delete(self, kind: str, owner: str, id: str) -> bool:
        """Whether it was there."""
        ...

    async def close(self) -> None: ...
