"""What a store of answers promises. A record is bytes with an owner; what they mean is its kind's affair."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


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
    labels: Mapping[str, str] = field(default_factory=dict)
    """what it is found by; names and values"""


class Page(NamedTuple):
    records: list[Record]
    """without their labels"""
    more: bool
    """whether others follow"""


class Store(Protocol):
    """Bounded by age since one was last put, read or continued, and by bytes; the longest unused go first.
    To be listed is not to be read.

    Nothing here blocks the event loop. Everything raises KvmeshError(UNAVAILABLE) where the medium fails;
    nothing is changed then.
    """

    async def put(self, record: Record) -> None:
        """Keep a record, in place of the one of the same kind and id. A record larger than the store may be
        is refused: KvmeshError(PAYLOAD_TOO_LARGE)."""
        ...

    async def replace(self, record: Record, was: bytes | None = None) -> bool:
        """`put` where one of the same kind, id and owner is there, and its body still `was` that, where
        given; else nothing. Whether there was."""
        ...

    async def chain(self, kind: str, owner: str, id: str, most: int) -> list[Record]:
        """The record and those it continues, the oldest first. Empty where it is not there.

        Raises KvmeshError(NOT_FOUND) where one of those it continues is gone, INVALID_ARGUMENT for
        more than `most`.
        """
        ...

    async def get(self, kind: str, owner: str, id: str) -> Record | None:
        """Without its labels."""
        ...

    async def page(
        self, kind: str, owner: str, labels: Mapping[str, str], after: str, limit: int, *, newest_first: bool
    ) -> Page:
        """At most `limit` of those that have all `labels`, by when they were created, from the one behind
        the id `after`; empty: from the first.

        Raises KvmeshError(NOT_FOUND) where `after` is not there.
        """
        ...

    async def labelled(self, kind: str, owner: str, names: Sequence[str]) -> list[Record]:
        """Those that have a label of any of these names, the oldest first, without their labels."""
        ...

    async def delete(self, kind: str, owner: str, id: str) -> bool:
        """Whether it was there."""
        ...

    async def close(self) -> None: ...
