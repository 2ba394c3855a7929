"""Keeps the prefix index equal to what workers and stores hold, from their events.

Batches arrive on NATS under `kvmesh.kv.<engine>` and `kvmesh.kv.store.<store>`.
What went missing is replayed by the holder's EventService;
a holder that joins, or keeps no such old batches any more, is read whole from its snapshot. Digests in the
batches show whether the index is what the holder has; if it is not, it is read anew. Until a holder's part
is complete the index has what the holder had after an earlier batch, or some of it, or nothing; the worker is
routed by that and by its load. A block that has gone meanwhile costs its computation, no more.

Workers are known from discovery. A store (KVBM) is known by events below the device tier, or by batches that
say where it is reached. Those, and the one this configuration names, are watched through their gRPC health,
and their blocks are forgotten when they die.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.common import metrics
from kvmesh.common.bus import Bus
from kvmesh.common.discovery import Discovery
from kvmesh.common.errors import KvmeshError
from kvmesh.common.events.columns import ENGINE_TIERS, STORE_TIERS, digests, read_digest
from kvmesh.common.events.publication import Head, snapshot_batches, subject
from kvmesh.common.events.source import EventSource
from kvmesh.common.events.stream import EventStream, Verdict
from kvmesh.common.grpc.client import Channels
from kvmesh.common.tasks import cancel
from kvmesh.core import PrefixIndex
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.events_pb2 import KvEventBatch, TierDigest
from kvmesh.v1.router_pb2 import IndexedHolder

log = structlog.get_logger()

# Holders read at once: a snapshot may be large, and one that hangs must not keep the others waiting.
MAX_REPAIRS = 64
# Pauses between attempts to repair a holder: the first, the longest.
RETRY_S = (0.05, 2.0)


class Observer(Protocol):
    """Follows what the index learns of one worker."""

    def linked(self, index_id: int) -> None:
        """The worker has this id in the index from now on."""
        ...

    def apply(self, batch: bytes) -> None:
        """Apply a batch to the index. Raises as `PrefixIndex.apply` does."""
        ...

    def cleared(self) -> None:
        """The worker's part of the index was emptied, to be read anew."""
        ...


@dataclass(slots=True, eq=False)
class Holder:
    """One worker or store, as the index knows it."""

    id: str
    index_id: int
    node: str
    engine: bool
    stream: EventStream
    # Where its snapshots and replays come from; empty: nowhere, or it is down.
    address: str = ""
    # Of a worker, from discovery: batches of another one are void.
    incarnation: int = 0
    repairing: asyncio.Task[None] | None = None

    @property
    def tiers(self) -> dict[Tier, str]:
        return ENGINE_TIERS if self.engine else STORE_TIERS


class IndexFeed:
    """Owns a PrefixIndex and feeds it. Belongs to one event loop."""

    def __init__(
        self,
        index: PrefixIndex,
        discovery: Discovery,
        bus: Bus,
        channels: Channels,
        store_id: str = "",
        store_address: str = "",
        store_node: str = "",
    ) -> None:
        """`store_id` at `store_address` is the KVBM store to watch; empty: none."""
        self.index = index
        self._discovery = discovery
        self._bus = bus
        self._channels = channels
        self._store = (store_id, store_address, store_node)
        self._holders: dict[str, Holder] = {}
        # The same, by id in the index and by node: asked for with every request.
        self._engines: dict[int, Holder] = {}
        self._stores: dict[str, list[Holder]] = {}
        self._observers: dict[str, Observer] = {}
        self._repairs = asyncio.Semaphore(MAX_REPAIRS)
        # By store.
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._metrics = metrics.router()
        self._counters = {verdict: self._metrics.batches.labels(verdict.value) for verdict in Verdict}
        self._generation = -1
        self.gaps_total = 0
        self.divergences_total = 0

    async def start(self) -> None:
        """Begin following all holders; returns at once."""
        await self._bus.subscribe(subject("*"), self._on_message)
        await self._bus.subscribe(subject("*", store=True), self._on_message)
        self._bus.on_reconnect(self._on_reconnect)
        self._discovery.subscribe(self._on_members)
        self._on_members()
        if self._store[0]:
            self._watch(*self._store)

    async def close(self) -> None:
        await cancel(*self._watching.values(), *(holder.repairing for holder in self._holders.values()))

    def observe(self, worker_id: str, observer: Observer) -> None:
        """Let `observer` follow a worker, whether or not it is known yet, through all of its lives."""
        self._observers[worker_id] = observer
        holder = self._holders.get(worker_id)
        if holder is not None and holder.engine:
            observer.linked(holder.index_id)

    def unobserve(self, worker_id: str, observer: Observer) -> None:
        if self._observers.get(worker_id) is observer:
            del self._observers[worker_id]

    def blocks_of(self, holder_id: str) -> int:
        """Blocks the index holds for a worker or store, over all tiers."""
        holder = self._holders.get(holder_id)
        if holder is None:
            return 0
        return sum(self.index.digest(holder.index_id, tier)[0] for tier in holder.tiers.values())

    def live_holders(self) -> int:
        """Holders whose part of the index is complete."""
        return sum(holder.stream.live for holder in self._holders.values())

    def stores_of(self, node: str) -> list[str]:
        """Addresses of the stores on a node that answer."""
        return [store.address for store in self._stores.get(node, ()) if store.address]

    def source_for(self, node: str, hashes: Sequence[int]) -> tuple[str, int]:
        """The store of another node behind which most leading blocks of a prompt are, and how many.

        They are counted as the engines of its node see them: what an engine has, its store mostly has, too.
        ("", 0) where no other node has a store that answers.
        """
        elsewhere = {
            of: store.address
            for of, stores in self._stores.items()
            for store in stores
            if store.address and of not in ("", node)
        }
        if not elsewhere or not hashes:
            return "", 0
        found = ("", 0)
        for index_id, depths in self.index.match(hashes).items():
            address = elsewhere.get(self._engines[index_id].node)
            if address is not None and depths[2] > found[1]:
                found = (address, depths[2])
        return found

    def behind(self) -> int:
        """Batches known to exist and not applied, over all holders."""
        return sum(holder.stream.behind for holder in self._holders.values())

    def holders(self) -> list[IndexedHolder]:
        """Every holder and how far the index is with it."""
        return [
            IndexedHolder(
                id=holder.id,
                incarnation=holder.stream.incarnation,
                sequence=holder.stream.sequence,
                live=holder.stream.live,
                address=holder.address,
                digests=digests(self.index, holder.index_id, holder.tiers),
                forgotten=sum(self.index.forgotten(holder.index_id, name) for name in holder.tiers.values()),
            )
            for holder in self._holders.values()
        ]

    def snapshot(self, holder_id: str) -> Iterator[KvEventBatch]:
        """What the index has of a holder at this moment. Raises KvmeshError(NOT_FOUND)."""
        holder = self._holders.get(holder_id)
        if holder is None:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_NOT_FOUND, f"the index has no holder {holder_id or 'without a name'}"
            )
        # Copies, so that later changes do not show.
        chains = [
            (tier, self.index.blocks(holder.index_id, name).tolist(), None)
            for tier, name in holder.tiers.items()
        ]
        head = Head(
            holder_id=holder.id,
            incarnation=holder.stream.incarnation,
            node=holder.node,
            address="" if holder.engine else holder.address,
        )
        final = digests(self.index, holder.index_id, holder.tiers)
        return snapshot_batches(head, holder.stream.sequence, chains, final)

    # Members.

    def _on_members(self) -> None:
        if self._generation == self._discovery.generation:
            return
        self._generation = self._discovery.generation
        workers = self._discovery.workers()
        for holder in [h for h in self._holders.values() if h.engine and h.id not in workers]:
            self._drop(holder)
        for info in workers.values():
            holder = self._holders.get(info.id)
            if holder is not None and (not holder.engine or holder.incarnation != info.incarnation):
                self._drop(holder)
                holder = None
            if holder is None:
                holder = self._add(info.id, info.node, engine=True)
                holder.incarnation = info.incarnation
                holder.stream.expect(info.incarnation)
            if holder.address != info.address:
                holder.address = info.address
                self._repair(holder)

    def _add(self, holder_id: str, node: str, *, engine: bool) -> Holder:
        add = self.index.add_engine if engine else self.index.add_store
        index_id = add(holder_id, node or None)

        def apply(batch: KvEventBatch) -> bool:
            return self._apply(holder, batch)

        def reset() -> None:
            self.index.clear(index_id)
            if holder_id in self._observers:
                self._observers[holder_id].cleared()

        holder = Holder(holder_id, index_id, node, engine, EventStream(apply, reset))
        self._holders[holder_id] = holder
        if not engine:
            self._stores.setdefault(node, []).append(holder)
            return holder
        self._engines[index_id] = holder
        if holder_id in self._observers:
            self._observers[holder_id].linked(index_id)
        return holder

    def _drop(self, holder: Holder) -> None:
        if holder.repairing is not None:
            holder.repairing.cancel()
        del self._holders[holder.id]
        if holder.engine:
            del self._engines[holder.index_id]
        else:
            self._stores[holder.node].remove(holder)
        self.index.drop(holder.index_id)

    # Batches.

    def _on_message(self, subject: str, payload: bytes) -> None:
        batch = KvEventBatch.FromString(payload)
        holder = self._holders.get(batch.holder_id)
        if holder is None:
            if not batch.address and not _below_device(batch):
                # A worker that discovery does not know yet; its snapshot will hold this.
                self._metrics.batches.labels("unknown").inc()
                return
            holder = self._add(batch.holder_id, batch.node, engine=False)
        if not holder.engine and batch.address and holder.id not in self._watching:
            self._watch(holder.id, batch.address, batch.node)
        if holder.engine and batch.incarnation != holder.incarnation:
            self._counters[Verdict.STALE].inc()
            return
        self._receive(holder, batch)
        if holder.stream.live:
            return
        if holder.address or holder.id in self._watching:
            self._repair(holder)
        else:
            # A store nobody can ask: what it held before is unknown here, what follows is not.
            holder.stream.start_at(batch)

    def _receive(self, holder: Holder, batch: KvEventBatch) -> None:
        self._count(holder, holder.stream.receive(batch))

    def _count(self, holder: Holder, verdict: Verdict) -> None:
        self._counters[verdict].inc()
        if verdict is Verdict.GAP:
            self.gaps_total += 1
            self._metrics.gaps.inc()
        elif verdict is Verdict.DIVERGED:
            self.divergences_total += 1
            self._metrics.divergences.inc()
            log.error("the index was not what its holder has; reading it anew", holder=holder.id)

    def _apply(self, holder: Holder, batch: KvEventBatch) -> bool:
        try:
            follower = self._observers.get(holder.id) or self.index
            follower.apply(batch.SerializeToString())
        except ValueError as error:
            log.error("unreadable batch", holder=holder.id, sequence=batch.sequence, error=str(error))
            return False
        # Where nobody can be asked there was no whole state to begin with.
        return not holder.address or all(self._agrees(holder, digest) for digest in batch.digests)

    def _agrees(self, holder: Holder, digest: TierDigest) -> bool:
        """Whether the index has what the holder has in a tier, or less by no more than it has forgotten."""
        name = holder.tiers.get(digest.tier)
        if name is None:
            return True
        ours, truth = self.index.digest(holder.index_id, name), read_digest(digest)
        # What lacks only forgotten blocks has fewer, by no more than those. As many with another sum, or
        # more, are some the holder has not.
        lacking = truth[0] - ours[0]
        return ours == truth or 0 < lacking <= self.index.forgotten(holder.index_id, name)

    # Repair.

    def _on_reconnect(self) -> None:
        # Whatever was published meanwhile is lost, a last batch without any gap to show for it.
        for holder in self._holders.values():
            self._repair(holder)

    def _repair(self, holder: Holder) -> None:
        if holder.address and (holder.repairing is None or holder.repairing.done()):
            holder.repairing = asyncio.create_task(
                self._repair_until_live(holder), name=f"index-repair-{holder.id}"
            )

    async def _repair_until_live(self, holder: Holder) -> None:
        pause, longest = RETRY_S
        while holder.address:
            replayable = holder.stream.sequence > 0 and not holder.stream.loading
            way, read = ("replay", self._replay) if replayable else ("snapshot", self._restore)
            try:
                async with self._repairs:
                    await read(holder, EventSource(self._channels, holder.address))
                self._metrics.repairs.labels(way, "applied").inc()
                if holder.stream.live:
                    return
            except KvmeshError as error:
                self._metrics.repairs.labels(way, "failed").inc()
                if replayable and error.code == ErrorCode.ERROR_CODE_NOT_FOUND:
                    # What is missing is not kept any more.
                    holder.stream.doubt()
                    continue
                log.info("holder not read, trying again", holder=holder.id, by=way, error=error.message)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _replay(self, holder: Holder, source: EventSource) -> None:
        stream = holder.stream
        batches = source.replay(holder.id, stream.incarnation, stream.sequence + 1)
        async with aclosing(batches):
            async for batch in batches:
                self._receive(holder, batch)

    async def _restore(self, holder: Holder, source: EventSource) -> None:
        batches = await source.snapshot(holder.id)
        stream, last = holder.stream, batches[-1]
        if stream.live:
            # The life's first batch has come meanwhile.
            return
        if holder.engine and last.incarnation != holder.incarnation:
            raise KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, "snapshot of another incarnation")
        stream.begin(last.incarnation)
        for batch in batches:
            # Other work goes on between the parts, and may find that the holder is gone.
            await asyncio.sleep(0)
            if not stream.loading or stream.incarnation != last.incarnation:
                return
            self._count(holder, stream.load(batch, last=batch is last))
        if stream.live:
            log.info("holder indexed", holder=holder.id, blocks=self.blocks_of(holder.id))

    def _watch(self, store_id: str, address: str, node: str) -> None:
        watch = self._watch_store(store_id, address, node)
        self._watching[store_id] = asyncio.create_task(watch, name=f"index-store-{store_id}")

    async def _watch_store(self, store_id: str, address: str, node: str) -> None:
        """Follow a store's life; there is no lease that would tell.

        The configured one for ever, others until they are lost: their next batch says where they are then.
        """
        holder = self._holders.get(store_id) or self._add(store_id, node, engine=False)
        # The published stubs know the synchronous API only.
        health: Any = health_pb2_grpc.HealthStub(self._channels.get(address))
        pause, longest = RETRY_S
        while True:
            try:
                async for answer in health.Watch(health_pb2.HealthCheckRequest()):
                    if answer.status == health_pb2.HealthCheckResponse.SERVING and not holder.address:
                        pause = RETRY_S[0]
                        holder.address = address
                        holder.stream.forget()
                        self._repair(holder)
            except grpc.RpcError as error:
                log.debug("store not reachable", store=store_id, error=str(error))
            if holder.address:
                log.info("store lost", store=store_id)
                holder.address = ""
                holder.stream.forget()
                if store_id != self._store[0]:
                    del self._watching[store_id]
                    return
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)


def _below_device(batch: KvEventBatch) -> bool:
    return any(op >> 2 > Tier.TIER_DEVICE for op in batch.ops)
