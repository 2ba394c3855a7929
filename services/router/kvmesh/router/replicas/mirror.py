"""What one other replica has told of its leases: in order and whole, or known not to be."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Protocol

from kvmesh.router.replicas.ledger import weight
from kvmesh.v1.replicas_pb2 import LeaseBatch, LeaseProgress, ReplicaMessage, ToldLease

_MASK = 2**64 - 1


class Verdict(StrEnum):
    """What a message showed."""

    # All that the replica has told is known.
    WHOLE = "whole"
    # A part of a snapshot; the rest is to come.
    PART = "part"
    # Told before.
    DUPLICATE = "duplicate"
    # A batch is missing.
    GAP = "gap"
    # None is, and yet the digests differ, or a lease is not held that should be.
    DIVERGED = "diverged"


class Effects(Protocol):
    """Who counts the leases of replicas in."""

    def open(self, replica: str, told: ToldLease) -> None:
        """A lease is there; it may have been told before."""
        ...

    def progress(self, replica: str, change: LeaseProgress) -> bool:
        """A lease was renewed; False where it is not held here and should be."""
        ...

    def end(self, replica: str, lease: int) -> None: ...


class Mirror:
    """One life of one replica. After a `GAP` only a snapshot helps, and what is told before it comes is not
    applied."""

    def __init__(self, replica: str, incarnation: int, effects: Effects) -> None:
        self.replica = replica
        self.incarnation = incarnation
        self._effects = effects
        # By lease, what it adds to the digest.
        self._leases: dict[int, int] = {}
        self._digest = 0
        # The latest batch that was applied.
        self.sequence = 0
        self.whole = False
        # Parts of a snapshot that have come.
        self._parts: list[LeaseBatch] = []

    def __len__(self) -> int:
        """Its leases."""
        return len(self._leases)

    def receive(self, message: ReplicaMessage) -> Verdict:
        """Take a message of this life."""
        verdict = self._take(message)
        if verdict is Verdict.WHOLE and message.digest != self._digest:
            verdict = Verdict.DIVERGED
        if verdict is not Verdict.DUPLICATE:
            self.whole = verdict is Verdict.WHOLE
        return verdict

    def _take(self, message: ReplicaMessage) -> Verdict:
        if not message.HasField("batch"):
            parts, self._parts = self._parts, []
            whole = message.sequence == self.sequence and not parts
            return Verdict.WHOLE if whole else Verdict.GAP
        batch = message.batch
        if message.sequence <= self.sequence:
            return Verdict.DUPLICATE
        if batch.parts:
            return self._collect(message.sequence, batch)
        if message.sequence != self.sequence + 1:
            return Verdict.GAP
        self.sequence = message.sequence
        return self._apply(batch)

    def _collect(self, sequence: int, batch: LeaseBatch) -> Verdict:
        if batch.part == 0:
            self._parts = []
        if batch.part != len(self._parts):
            self._parts = []
            return Verdict.GAP
        self._parts.append(batch)
        if len(self._parts) < batch.parts:
            return Verdict.PART
        parts, self._parts = self._parts, []
        self.sequence = sequence
        self._replace([told for part in parts for told in part.opened])
        return Verdict.WHOLE

    def _replace(self, leases: list[ToldLease]) -> None:
        self._end(self._leases.keys() - {told.lease_id for told in leases})
        # Whatever it was that did not add up is not carried on.
        self._leases, self._digest = {}, 0
        self._open(leases)

    def _apply(self, batch: LeaseBatch) -> Verdict:
        self._open(batch.opened)
        held = True
        for change in batch.progressed:
            self._weigh(change.lease_id, change.output_tokens, prefilled=change.prefilled)
            held &= self._effects.progress(self.replica, change)
        self._end(batch.ended)
        return Verdict.WHOLE if held else Verdict.DIVERGED

    def _open(self, leases: Iterable[ToldLease]) -> None:
        for told in leases:
            self._weigh(told.lease_id, told.output_tokens, prefilled=told.prefilled)
            self._effects.open(self.replica, told)

    def _end(self, leases: Iterable[int]) -> None:
        for lease in leases:
            self._digest = (self._digest - self._leases.pop(lease, 0)) & _MASK
            self._effects.end(self.replica, lease)

    def _weigh(self, lease: int, output_tokens: int, *, prefilled: bool) -> None:
        now = weight(lease, output_tokens, prefilled=prefilled)
        self._digest = (self._digest - self._leases.get(lease, 0) + now) & _MASK
        self._leases[lease] = now
