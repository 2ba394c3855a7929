"""What the stores of other nodes say they have, from the batches they publish."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from kvmesh.common.bus import Bus
from kvmesh.common.errors import KvmeshError
from kvmesh.common.events.publication import IDLE_S, subject
from kvmesh.common.events.source import EventSource
from kvmesh.common.events.stream import EventStream
from kvmesh.common.grpc.client import Channels
from kvmesh.common.tasks import cancel
from kvmesh.core import PrefixIndex
from kvmesh.v1.events_pb2 import KvEventBatch

log = structlog.get_logger()

# A store fills its pauses with batches; one that has been silent for so long is gone.
SILENT_S = 5 * IDLE_S
# The index's memory, at most: some millions of blocks.
MAX_BYTES = 256 << 20
# Snapshots read at once, and the pause after one that failed.
MAX_READS = 4
RETRY_S = 1.0


@dataclass(eq=False)
class _Neighbour:
    """One store, on a node of its own in the index, where an engine that nobody has looks at it."""

    id: str
    address: str
    store: int
    eye: int
    stream: EventStream
    heard: float = 0.0
    reading: asyncio.Task[None] | None = None


class Neighbours:
    """Follows the stores of all other nodes. Belongs to one event loop.

    What it knows is a guess: where a block is not there any more, only time is lost. A store is read whole
    when batches of it were missed; nothing is repaired.
    """

    def __init__(self, bus: Bus, channels: Channels, own_id: str) -> None:
        self._bus = bus
        self._channels = channels
        self._own_id = own_id
        self._neighbours: dict[str, _Neighbour] = {}
        self._reads = asyncio.Semaphore(MAX_READS)
        self._watching: asyncio.Task[None] | None = None
        self.index = PrefixIndex(MAX_BYTES)

    async def start(self) -> None:
        await self._bus.subscribe(subject("*", store=True), self._on_message)
        self._watching = asyncio.create_task(self._watch(), name="kvbm-neighbours")

    async def close(self) -> None:
        await cancel(self._watching, *(neighbour.reading for neighbour in self._neighbours.values()))

    def best(self, hashes: Sequence[int]) -> tuple[str, int]:
        """Where the store is that has most leading blocks of a chain, and how many; ("", 0): none has any."""
        matched, found = self.index.match(hashes), ("", 0)
        for neighbour in self._neighbours.values():
            depth = matched[neighbour.eye][2] if neighbour.eye in matched else 0
            if depth > found[1]:
                found = (neighbour.address, depth)
        return found

    def addresses(self) -> list[str]:
        """Of all stores that are known, sorted."""
        return sorted(neighbour.address for neighbour in self._neighbours.values())

    def _on_message(self, subject: str, payload: bytes) -> None:
        batch = KvEventBatch.FromString(payload)
        # Without an address nothing can be fetched.
        if not batch.address or batch.holder_id == self._own_id:
            return
        neighbour = self._neighbours.get(batch.holder_id)
        if neighbour is not None and neighbour.address != batch.address:
            self._drop(neighbour)
            neighbour = None
        if neighbour is None:
            neighbour = self._add(batch.holder_id, batch.address)
        neighbour.heard = asyncio.get_running_loop().time()
        neighbour.stream.receive(batch)
        if not neighbour.stream.live and (neighbour.reading is None or neighbour.reading.done()):
            reading = self._read(neighbour)
            neighbour.reading = asyncio.create_task(reading, name=f"kvbm-neighbour-{neighbour.id}")

    def _add(self, holder_id: str, address: str) -> _Neighbour:
        store = self.index.add_store(holder_id, holder_id)
        eye = self.index.add_engine(f"{holder_id}/eye", holder_id)

        def apply(batch: KvEventBatch) -> bool:
            try:
                self.index.apply(batch.SerializeToString())
            except ValueError as error:
                log.error("unreadable batch", store=holder_id, sequence=batch.sequence, error=str(error))
                return False
            return True

        stream = EventStream(apply, lambda: self.index.clear(store))
        neighbour = _Neighbour(holder_id, address, store, eye, stream)
        self._neighbours[holder_id] = neighbour
        return neighbour

    def _drop(self, neighbour: _Neighbour) -> None:
        if neighbour.reading is not None:
            neighbour.reading.cancel()
        del self._neighbours[neighbour.id]
        self.index.drop(neighbour.eye)
        self.index.drop(neighbour.store)

    async def _read(self, neighbour: _Neighbour) -> None:
        """Take a store's whole state; the next batch asks for it again where that fails."""
        stream = neighbour.stream
        try:
            async with self._reads:
                source = EventSource(self._channels, neighbour.address)
                batches = await source.snapshot(neighbour.id)
        except KvmeshError as error:
            log.info("store not read", store=neighbour.id, error=error.message)
            await asyncio.sleep(RETRY_S)
            return
        if stream.live:
            return
        stream.begin(batches[-1].incarnation)
        for batch in batches:
            # Engines' look-ups wait for the index, not for all of this.
            await asyncio.sleep(0)
            if not stream.loading or stream.incarnation != batches[-1].incarnation:
                return
            stream.load(batch, last=batch is batches[-1])

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(IDLE_S)
            for neighbour in list(self._neighbours.values()):
                if loop.time() - neighbour.heard > SILENT_S:
                    log.info("store lost", store=neighbour.id)
                    self._drop(neighbour)
