"""A holder's stream of batches: numbered, digested, kept for replay, and announced while nothing happens."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypedDict

from kvmesh.common.bus import Bus
from kvmesh.common.errors import KvmeshError
from kvmesh.common.events.columns import (
    ENGINE_TIERS,
    STORE_TIERS,
    Columns,
    digests,
)
from kvmesh.common.tasks import cancel
from kvmesh.common.telemetry import current_traceparent, span
from kvmesh.common.trace import TRACEPARENT
from kvmesh.core import PrefixIndex
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.events_pb2 import KvEventBatch, TierDigest

# Events of a burst share a batch for this long at most.
MAX_DELAY_S = 0.002
# A pause is filled with a batch of no events this often: its number shows a reader the loss of the last
# one before the pause, its digests that what it holds is still right.
IDLE_S = 1.0
# Bytes of batches kept for replay, and what a kept batch takes beside its bytes.
MAX_KEPT_BYTES = 16 << 20
_KEPT_OVERHEAD = 512
# Of those, bytes that are always replayed. More are only where a snapshot would be more: what happened in an
# hour to a few blocks takes readers longer than the blocks.
REPLAYED_BYTES = 1 << 20
# Of a snapshot, for each block: its hash, and what names its parent.
_BLOCK_BYTES = 12
# Blocks in a part of a snapshot: a millisecond or so of this process's time.
SNAPSHOT_BLOCKS = 1 << 13

# A tier, blocks of which each is the parent of the next, and the block before the first.
Chain = tuple[int, Sequence[int], int | None]


class Head(TypedDict):
    """What all batches of a holder's life begin with."""

    holder_id: str
    incarnation: int
    node: str
    address: str


def subject(holder_id: str, *, store: bool = False) -> str:
    """Where a holder's batches are published; stores apart, for who follows these alone."""
    return f"kvmesh.kv.store.{holder_id}" if store else f"kvmesh.kv.{holder_id}"


class Publication:
    """Publishes one life of one holder. Belongs to one event loop; nothing in it waits for the bus.

    Every batch is applied to an index of its own before it goes out, so that its digests are what a reader
    must have who applies the same.
    """

    def __init__(
        self,
        bus: Bus,
        holder_id: str,
        incarnation: int,
        node: str,
        chains: Callable[[], Iterable[Chain]],
        *,
        engine: bool,
        address: str = "",
    ) -> None:
        """`chains` gives the holder's blocks of this moment; what it yields later must not change with them.

        It may publish what is pending; events the holder told before must all be in it. `address` is where a
        store is reached.
        """
        self._bus = bus
        self._subject = subject(holder_id, store=not engine)
        self._head = Head(holder_id=holder_id, incarnation=incarnation, node=node, address=address)
        self._chains = chains
        self._tiers = ENGINE_TIERS if engine else STORE_TIERS
        self._index = PrefixIndex()
        add = self._index.add_engine if engine else self._index.add_store
        # Nobody matches against it, so any node will do for a store that names none.
        self._index_id = add(holder_id, node or holder_id)
        self._columns = Columns()
        self._kept: deque[tuple[KvEventBatch, int]] = deque()
        self._kept_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._flushed_at = float("-inf")
        self._announcing: asyncio.Task[None] | None = None
        self.holder_id = holder_id
        self.incarnation = incarnation
        # Of the last batch; 0 before the first.
        self.sequence = 0
        # Readers that missed a batch while the bus was away learn it from the next one's number.
        bus.on_reconnect(self._publish)

    def start(self) -> None:
        """Fill pauses from now on, until `close`."""
        self._announcing = asyncio.create_task(self._announce(), name="kv-events-idle")

    async def close(self) -> None:
        """Publish what is pending and stop. Idempotent."""
        self.flush()
        announcing, self._announcing = self._announcing, None
        await cancel(announcing)

    # What happened, in order. Published by `flush` or `flush_soon`, or before that when a batch is full.

    def stored(self, tier: int, hashes: Sequence[int], parent: int | None) -> None:
        """The holder has a chain of blocks, behind `parent` or from a prompt's start."""
        for part in self._parts(hashes):
            self._columns.stored(tier, part, parent)
            parent = part[-1]

    def removed(self, tier: int, hashes: Sequence[int]) -> None:
        """The holder has these blocks no more."""
        for part in self._parts(hashes):
            self._columns.removed(tier, part)

    def cleared(self, tier: int = Tier.TIER_UNSPECIFIED) -> None:
        """The holder has nothing in the tier, or at all."""
        if self._columns.room() <= 0:
            self.flush()
        self._columns.cleared(tier)

    def flush_soon(self) -> None:
        """Now if the last batch is a while ago, else when it is."""
        loop = asyncio.get_running_loop()
        due = self._flushed_at + MAX_DELAY_S
        if loop.time() >= due:
            self.flush()
        elif self._timer is None:
            self._timer = loop.call_at(due, self.flush)

    def flush(self) -> None:
        """Publish what is pending."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._columns:
            self._publish()

    # What readers ask for.

    def snapshot(self) -> Iterator[KvEventBatch]:
        """The holder's blocks of this moment; the last batch has their sequence and digests."""
        chains = self._chains()
        self.flush()
        return snapshot_batches(self._head, self.sequence, chains, self._digests())

    def replay(self, incarnation: int, first: int) -> list[KvEventBatch]:
        """The batches from number `first` on.

        Raises KvmeshError(NOT_FOUND) when not all are kept, or a snapshot is less to read.
        """
        behind = self.sequence + 1 - first
        if incarnation != self.incarnation or first < 1 or not 0 <= behind <= len(self._kept):
            oldest = self.sequence + 1 - len(self._kept)
            raise KvmeshError(
                ErrorCode.ERROR_CODE_NOT_FOUND,
                f"{self.holder_id} keeps batches {oldest} to {self.sequence} of incarnation "
                f"{self.incarnation:x}, not {first} of {incarnation:x}; take a snapshot",
            )
        missed = list(itertools.islice(self._kept, len(self._kept) - behind, None))
        held = self._index.stats()["held"]
        if sum(size for _, size in missed) > REPLAYED_BYTES + held * _BLOCK_BYTES:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_NOT_FOUND,
                f"{behind} batches are more than {self.holder_id}'s {held} blocks; take a snapshot",
            )
        return [batch for batch, _ in missed]

    def _parts(self, hashes: Sequence[int]) -> Iterable[Sequence[int]]:
        """The hashes of one event in pieces that fit into batches; none of an event without any."""
        if not hashes:
            return ()
        return (hashes,) if len(hashes) <= self._columns.room() else self._split(hashes)

    def _split(self, hashes: Sequence[int]) -> Iterator[Sequence[int]]:
        at = 0
        while at < len(hashes):
            room = self._columns.room()
            if room <= 0:
                self.flush()
                continue
            yield hashes[at : at + room]
            at += room

    async def _announce(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            pause = max(self._flushed_at, began) + IDLE_S - loop.time()
            if pause > 0:
                await asyncio.sleep(pause)
            else:
                self._publish()

    def _publish(self) -> None:
        self.sequence += 1
        self._flushed_at = asyncio.get_running_loop().time()
        columns, self._columns = self._columns, Columns()
        with span("kv.publish", events=len(columns)):
            batch = _batch(self._head, self.sequence, columns)
            batch.traceparent = current_traceparent()
            payload = batch.SerializeToString()
            self._index.apply(payload)
            batch.digests.extend(self._digests())
            # Messages of one kind merge when their bytes are put together: the columns are written once.
            payload += KvEventBatch(digests=batch.digests).SerializeToString()
            self._keep(batch, len(payload) + _KEPT_OVERHEAD)
            self._bus.publish(self._subject, payload, headers={TRACEPARENT: batch.traceparent})

    def _keep(self, batch: KvEventBatch, size: int) -> None:
        self._kept.append((batch, size))
        self._kept_bytes += size
        while self._kept_bytes > MAX_KEPT_BYTES:
            self._kept_bytes -= self._kept.popleft()[1]

    def _digests(self) -> list[TierDigest]:
        return digests(self._index, self._index_id, self._tiers)


def snapshot_batches(
    head: Head, sequence: int, chains: Iterable[Chain], final: Sequence[TierDigest]
) -> Iterator[KvEventBatch]:
    """Chains as batches of stored events that begin with `head`; the last has the digests."""
    columns = Columns()
    for tier, hashes, parent in chains:
        for start in range(0, len(hashes), SNAPSHOT_BLOCKS):
            if len(columns.hashes) >= SNAPSHOT_BLOCKS or len(columns) >= SNAPSHOT_BLOCKS:
                yield _batch(head, sequence, columns)
                columns = Columns()
            part = hashes[start : start + SNAPSHOT_BLOCKS]
            columns.stored(tier, part, hashes[start - 1] if start else parent)
    last = _batch(head, sequence, columns)
    last.digests.extend(final)
    yield last


def _batch(head: Head, sequence: int, columns: Columns) -> KvEventBatch:
    batch = KvEventBatch(sequence=sequence, **head)
    columns.write(batch)
    return batch
