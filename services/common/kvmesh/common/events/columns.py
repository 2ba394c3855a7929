"""What is in a KvEventBatch: events in columns, and the digests of the sets they lead to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from kvmesh.core import PrefixIndex
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.events_pb2 import KvEventBatch, TierDigest

# The tiers of each kind of holder, by their names in the index.
ENGINE_TIERS: dict[Tier, str] = {Tier.TIER_DEVICE: "device"}
STORE_TIERS: dict[Tier, str] = {Tier.TIER_HOST: "host", Tier.TIER_NVME: "nvme", Tier.TIER_NETWORK: "network"}

# Hashes in a batch, at most: 8 bytes each, and NATS refuses messages of more than 1 MiB.
MAX_HASHES = 1 << 16
# Upper bound of what an event adds to a batch beside its hashes, in hashes: operation, count, parent.
_EVENT_OVERHEAD = 2


class Kind(IntEnum):
    """An event's kind; an operation is Tier * 4 + kind."""

    # A prompt's first blocks, and a chain behind a known block.
    STORED_ROOT = 0
    STORED = 1
    REMOVED = 2
    CLEARED = 3


_KINDS = tuple(Kind)


class Event(NamedTuple):
    """One event as it was read; `parent` is set for STORED only."""

    kind: Kind
    tier: Tier
    hashes: NDArray[np.uint64]
    parent: int | None


class Columns:
    """The events of a batch that is being filled."""

    __slots__ = ("counts", "hashes", "ops", "parents")

    def __init__(self) -> None:
        self.ops: list[int] = []
        self.counts: list[int] = []
        self.hashes: list[int] = []
        self.parents: list[int] = []

    def __len__(self) -> int:
        """Events in it."""
        return len(self.ops)

    def room(self) -> int:
        """Hashes that one more event may have; 0 or less when it is full."""
        return MAX_HASHES - len(self.hashes) - _EVENT_OVERHEAD * (len(self.ops) + 1)

    def stored(self, tier: int, hashes: Sequence[int], parent: int | None) -> None:
        """A chain, behind `parent` or from a prompt's start."""
        if parent is None:
            self._add(tier, Kind.STORED_ROOT, hashes)
        else:
            self._add(tier, Kind.STORED, hashes)
            self.parents.append(parent)

    def removed(self, tier: int, hashes: Sequence[int]) -> None:
        self._add(tier, Kind.REMOVED, hashes)

    def cleared(self, tier: int) -> None:
        """Nothing is left in the tier; TIER_UNSPECIFIED: in any."""
        self._add(tier, Kind.CLEARED, ())

    def _add(self, tier: int, kind: Kind, hashes: Sequence[int]) -> None:
        self.ops.append(tier << 2 | kind)
        self.counts.append(len(hashes))
        self.hashes += hashes

    def write(self, batch: KvEventBatch) -> None:
        """Put the columns into an empty batch."""
        batch.ops.extend(self.ops)
        batch.counts.extend(self.counts)
        batch.hashes.extend(self.hashes)
        batch.parents.extend(self.parents)


def read(batch: KvEventBatch) -> Iterator[Event]:
    """A batch's events in order. Raises ValueError, before the first, for columns that do not add up."""
    ops, counts, parents = list(batch.ops), list(batch.counts), list(batch.parents)
    chained = [op & 3 for op in ops].count(Kind.STORED)
    if len(ops) != len(counts) or sum(counts) != len(batch.hashes) or chained != len(parents):
        raise ValueError(
            f"columns do not add up: {len(ops)} operations, {len(counts)} counts of {sum(counts)} hashes, "
            f"{len(batch.hashes)} hashes, {len(parents)} parents for {chained} chains"
        )
    hashes = np.array(batch.hashes, np.uint64)
    return _events(ops, counts, hashes, iter(parents))


def _events(
    ops: Sequence[int], counts: Sequence[int], hashes: NDArray[np.uint64], parents: Iterator[int]
) -> Iterator[Event]:
    at = 0
    for op, count in zip(ops, counts, strict=True):
        kind = _KINDS[op & 3]
        parent = next(parents) if kind is Kind.STORED else None
        yield Event(kind, cast(Tier, op >> 2), hashes[at : at + count], parent)
        at += count


def write_digest(tier: Tier, digest: tuple[int, int]) -> TierDigest:
    """A digest as `PrefixIndex.digest` gives it, for the wire."""
    count, total = digest
    return TierDigest(tier=tier, count=count, sum_low=total & (1 << 64) - 1, sum_high=total >> 64)


def read_digest(digest: TierDigest) -> tuple[int, int]:
    """(count, sum), as `PrefixIndex.digest` gives them."""
    return digest.count, digest.sum_high << 64 | digest.sum_low


def digests(index: PrefixIndex, holder: int, tiers: dict[Tier, str]) -> list[TierDigest]:
    """What the index has of a holder, tier by tier."""
    return [write_digest(tier, index.digest(holder, name)) for tier, name in tiers.items()]
