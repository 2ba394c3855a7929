"""The order of one holder's event batches: contiguous within an incarnation, or known to be incomplete."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from kvmesh.v1.events_pb2 import KvEventBatch

# Batches kept behind a gap. Further ones are dropped: the repair brings them, too.
MAX_HELD_BATCHES = 4096


class Verdict(StrEnum):
    """What became of a batch."""

    APPLIED = "applied"
    # Known already.
    DUPLICATE = "duplicate"
    # Of a former life of the holder.
    STALE = "stale"
    # A batch before it is missing, as was known; kept until that has come.
    HELD = "held"
    # As HELD, and the first to show it: a repair is needed.
    GAP = "gap"
    # Applied, and what it led to is not what the holder has: everything was forgotten, a repair is needed.
    DIVERGED = "diverged"


class EventStream:
    """Feeds `apply` with batches in order, and calls `reset` when what was applied is void.

    At any time exactly the batches up to (`incarnation`, `sequence`) have been applied, which is the empty
    state for sequence 0. Batches that come early wait for those before them, which come late, by a replay,
    or within a snapshot (`begin`, then `load` for each part).
    """

    def __init__(self, apply: Callable[[KvEventBatch], bool], reset: Callable[[], None]) -> None:
        """`apply` says whether the digests in the batch, if any, are those of what was applied."""
        self._apply = apply
        self._reset = reset
        self._held: dict[int, KvEventBatch] = {}
        # The latest batch of this life that is known to exist.
        self._latest = 0
        # Whether anything says how far the holder is: a batch of it, or a snapshot.
        self._heard = False
        self.incarnation = 0
        self.sequence = 0
        # Only a snapshot helps now: what arrives waits for it.
        self.loading = False

    @property
    def live(self) -> bool:
        """Whether everything that is known to exist has been applied."""
        return self._heard and not self.loading and self.sequence >= self._latest

    @property
    def behind(self) -> int:
        """Batches known to exist and not applied."""
        return max(self._latest - self.sequence, 0)

    def expect(self, incarnation: int) -> None:
        """A life of the holder begins or is heard of: forget the one before. Smaller ones are stale now."""
        self._reset()
        self._held.clear()
        self.incarnation = incarnation
        self.sequence = self._latest = 0
        self.loading = self._heard = False

    def receive(self, batch: KvEventBatch) -> Verdict:
        """Take a batch, in whatever order they come."""
        if batch.incarnation < self.incarnation:
            return Verdict.STALE
        if batch.incarnation > self.incarnation:
            self.expect(batch.incarnation)
        whole = self.live
        self._latest = max(self._latest, batch.sequence)
        if not self.loading and batch.sequence <= self.sequence:
            return Verdict.DUPLICATE
        if self.loading or batch.sequence > self.sequence + 1:
            if len(self._held) < MAX_HELD_BATCHES:
                self._held.setdefault(batch.sequence, batch)
            return Verdict.GAP if whole else Verdict.HELD
        return self._advance(batch)

    def begin(self, incarnation: int) -> None:
        """A snapshot has been fetched: everything is replaced, and what arrives waits for its last part."""
        if incarnation != self.incarnation:
            self.expect(incarnation)
        else:
            self._reset()
            self.sequence = 0
        self.loading = True

    def load(self, batch: KvEventBatch, *, last: bool) -> Verdict:
        """Apply a part of the snapshot. With the last one the stream stands at its sequence."""
        agrees = self._apply(batch)
        if not last:
            return Verdict.APPLIED
        self.loading = False
        return self._drain(batch.sequence) if agrees else self._diverged()

    def doubt(self) -> None:
        """What is missing cannot be had: keep what there is, and wait for a snapshot."""
        self.loading = True

    def forget(self) -> None:
        """Go back to the empty state: only a snapshot, or the life's first batch, helps."""
        self.expect(self.incarnation)

    def start_at(self, batch: KvEventBatch) -> None:
        """Begin from nothing with this batch: what came before it cannot be had."""
        self.expect(batch.incarnation)
        self._latest = batch.sequence
        self._apply(batch)
        self._heard = True
        self.sequence = batch.sequence

    def _advance(self, batch: KvEventBatch) -> Verdict:
        """Apply the next batch and all held ones that follow it."""
        return self._drain(batch.sequence) if self._apply(batch) else self._diverged()

    def _drain(self, sequence: int) -> Verdict:
        self._heard = True
        self.sequence = sequence
        self._latest = max(self._latest, sequence)
        while (batch := self._held.pop(self.sequence + 1, None)) is not None:
            if not self._apply(batch):
                return self._diverged()
            self.sequence = batch.sequence
        if self._held and min(self._held) <= sequence:
            self._held = {number: held for number, held in self._held.items() if number > self.sequence}
        return Verdict.APPLIED

    def _diverged(self) -> Verdict:
        latest = self._latest
        self.forget()
        self._latest = latest
        return Verdict.DIVERGED
