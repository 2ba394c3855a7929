"""Blocks that this store reads out of the arenas of others."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

import grpc.aio
import structlog

from kvmesh.common import metrics
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.client import Channels
from kvmesh.common.tasks import cancel
from kvmesh.core import FIRST_WORD, Incoming, StoreServer
from kvmesh.kvbm.lending import DIGEST_BYTES, MAX_BLOCKS, MAX_TTL_MS, Namespace, split, to_proto
from kvmesh.kvbm.link import Link, TransferError
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.kvbm_pb2 import FetchRequest, FetchResponse, ReturnRequest
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceStub

log = structlog.get_logger()

# Bytes read at a time: the first blocks can be used before the last have come.
BATCH_BYTES = 32 << 20
# Of the host tier, the part one batch may take.
BATCH_PART = 16
# Batches asked for or verified while another is read.
AHEAD = 2
# Fetches under way; more would only wait for the link.
MOST = 16
# How long one batch may be on its way, however much time there is: engines wait for what has begun.
BATCH_S = 5.0
# Weight of the last batch in a link's measured speed.
WEIGHT = 0.3
REASONS = ("absent", "refused", "unreachable", "late", "slow", "full", "transfer", "corrupt", "shed")


class NotFetchedError(Exception):
    """Blocks that do not come, by one of REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Fetching:
    """Fetches chains and counts what came of it. Belongs to one event loop."""

    def __init__(self, store: StoreServer, link: Link, channels: Channels) -> None:
        self._store = store
        self._link = link
        self._channels = channels
        self._under_way: dict[tuple[str, str, int], asyncio.Task[None]] = {}
        # By address: the agent that was there, and the bytes a second measured.
        self._agents: dict[str, str] = {}
        self.bytes_per_s: dict[str, float] = {}
        self.fetched = 0
        self.fetched_bytes = 0
        self.failed: Counter[str] = Counter()
        self._latency = metrics.kvbm().network_fetch

    def want(self, source: str, model: str, hashes: Sequence[int], within_s: float) -> None:
        """Begin to fetch what this store lacks of a chain from the store at `source`, in the time given.

        Never blocks or raises; what does not come is counted.
        """
        key = (source, model, hashes[-1])
        if key in self._under_way:
            return
        if len(self._under_way) >= MOST:
            self.failed["shed"] += len(hashes)
            return
        until = asyncio.get_running_loop().time() + within_s
        task = asyncio.create_task(self._fetch(source, model, list(hashes), until), name="kvbm-fetch")
        self._under_way[key] = task
        task.add_done_callback(lambda _: self._under_way.pop(key, None))

    async def fetch(
        self, source: str, namespace: Namespace, parent: bytes, hashes: Sequence[int], within_s: float
    ) -> int:
        """Fetch blocks that follow `parent` and wait for them; how many are not here then."""
        if not hashes:
            return 0
        until = asyncio.get_running_loop().time() + within_s
        await self._fetch_chain(source, namespace, list(hashes), until, parent)
        known = await asyncio.to_thread(self._store.known, namespace, list(hashes))
        return len(hashes) - len(known) // DIGEST_BYTES

    async def greet(self, source: str, namespace: Namespace) -> bool:
        """Get to know the store at `source` ahead of the first fetch; whether it is known. Never raises."""
        request = FetchRequest(namespace=to_proto(namespace), hashes=[0], ttl_ms=1)
        try:
            lent = await self._stub(source).Fetch(request, timeout=BATCH_S)
            if not self._link.knows(lent.agent):
                await self._meet(source, lent)
        except (grpc.aio.AioRpcError, NotFetchedError) as error:
            log.debug("store not met", source=source, error=str(error))
            return False
        return True

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    async def close(self) -> None:
        await cancel(*self._under_way.values())

    async def _fetch(self, source: str, model: str, hashes: list[int], until: float) -> None:
        namespaces = await asyncio.to_thread(self._store.namespaces, model)
        if not namespaces:
            self.failed["absent"] += len(hashes)
        for namespace in namespaces:
            whole = await self._fetch_chain(source, namespace, hashes, until)
            left = until - asyncio.get_running_loop().time()
            if not whole and left > 0 and "network" in self._store.tiers:
                # The store may be gone, and what it wrote still be there.
                await asyncio.to_thread(self._store.recall, model, hashes, left)

    async def _fetch_chain(
        self, source: str, namespace: Namespace, hashes: list[int], until: float, parent: bytes = b""
    ) -> bool:
        """Whether all of it is here."""
        last = len(hashes) + 1
        try:
            while True:
                known = await asyncio.to_thread(self._store.known, namespace, hashes)
                at = len(known) // DIGEST_BYTES
                if at == len(hashes):
                    return True
                if len(hashes) - at >= last:
                    raise NotFetchedError("full", "what came was evicted at once")
                last = len(hashes) - at
                await self._fetch_missing(
                    source, namespace, known[-DIGEST_BYTES:] or parent, hashes[at:], until
                )
        except NotFetchedError as error:
            known = await asyncio.to_thread(self._store.known, namespace, hashes)
            missing = len(hashes) - len(known) // DIGEST_BYTES
            self.failed[error.reason] += missing
            log.info(
                "blocks not fetched",
                source=source,
                model=namespace[0][0],
                blocks=missing,
                reason=error.reason,
                error=str(error),
            )
            return False

    async def _fetch_missing(
        self, source: str, namespace: Namespace, parent: bytes, hashes: list[int], until: float
    ) -> None:
        """One pass through what follows `parent`, by batches: while one is read, the one before is verified
        and the one behind is asked for. Raises NotFetchedError when nothing is under way any more.
        """
        size, turn = self._batch_blocks(namespace), asyncio.Lock()
        batches: list[asyncio.Task[None]] = []
        try:
            for at in range(0, len(hashes), size):
                wanted = hashes[at : at + size]
                lent = await self._borrow(source, namespace, wanted, until)
                taking = self._take(source, namespace, parent, lent, turn, until)
                batches.append(asyncio.create_task(taking, name="kvbm-batch"))
                if len(lent.digests) < len(wanted):
                    break
                parent = lent.digests[-1]
                if len(batches) > AHEAD:
                    await batches[-1 - AHEAD]
        except asyncio.CancelledError:
            for batch in batches:
                batch.cancel()
            raise
        finally:
            # A read that is cut short for another batch's fault would cost the connection.
            await asyncio.gather(*batches, return_exceptions=True)
        for batch in batches:
            batch.result()

    def _batch_blocks(self, namespace: Namespace) -> int:
        block = sum(namespace[2])
        most = min(BATCH_BYTES, self._store.arena[1] // BATCH_PART)
        return max(1, min(MAX_BLOCKS, most // block))

    async def _borrow(
        self, source: str, namespace: Namespace, hashes: list[int], until: float
    ) -> FetchResponse:
        """Leading blocks of those named, one at least, to be given back. Raises NotFetchedError."""
        left = min(until - asyncio.get_running_loop().time(), BATCH_S)
        speed, size = self.bytes_per_s.get(source), sum(namespace[2]) * len(hashes)
        if left <= 0:
            raise NotFetchedError("late", "the time is over")
        if speed and size / speed > left:
            # Computing them is faster. A link may get better, so the next is told of less than this one was.
            self.bytes_per_s[source] = speed * (1 + WEIGHT)
            raise NotFetchedError("slow", f"{size} bytes would take {size / speed:.3f} s of {left:.3f}")
        agent = self._agents.get(source, "")
        request = FetchRequest(
            namespace=to_proto(namespace),
            hashes=hashes,
            # Taking it may last as long as asking for it.
            ttl_ms=min(max(round(2e3 * left), 1) + 1000, MAX_TTL_MS),
            agent=agent if self._link.knows(agent) else "",
        )
        try:
            lent: FetchResponse = await self._stub(source).Fetch(request, timeout=left)
        except grpc.aio.AioRpcError as error:
            raise _refusal(KvmeshError.from_rpc(error, "kvbm")) from None
        if not lent.receipt:
            raise NotFetchedError("absent", "the store has none of them")
        asked = [_hash(digest) for digest in lent.digests] == hashes[: len(lent.digests)]
        if not asked or not len(lent.addresses) == len(lent.digests) > 0:
            await self._give_back(source, ReturnRequest(receipt=lent.receipt))
            raise NotFetchedError("refused", "the store answered of other blocks")
        return lent

    async def _take(
        self,
        source: str,
        namespace: Namespace,
        parent: bytes,
        lent: FetchResponse,
        turn: asyncio.Lock,
        until: float,
    ) -> None:
        """Read lent blocks that follow `parent` when it is their turn, verify them and give them back.

        Raises NotFetchedError.
        """
        until = min(until, asyncio.get_running_loop().time() + BATCH_S)
        wrong: list[int] = []
        try:
            async with turn:
                if not self._link.knows(lent.agent):
                    await self._meet(source, lent)
            digests = b"".join(lent.digests)
            incoming: Incoming = await asyncio.to_thread(self._store.expect, namespace, parent, digests)
            try:
                places = incoming.places
                if not places:
                    raise NotFetchedError("full", "memory has no room, or they are on their way")
                if lent.slot_bytes != incoming.slot_bytes:
                    raise NotFetchedError("refused", "the store's slots have another size")
                async with turn:
                    began = time.perf_counter()
                    await self._read(source, lent, incoming, until)
                wrong = await asyncio.to_thread(self._store.arrived, incoming)
                self._latency.observe(time.perf_counter() - began)
            finally:
                incoming.release()
            good = len(places) - len(wrong)
            self.fetched += good
            self.fetched_bytes += good * lent.slot_bytes
        finally:
            await self._give_back(source, ReturnRequest(receipt=lent.receipt, wrong=wrong))
        if wrong:
            raise NotFetchedError("corrupt", f"{len(wrong)} blocks did not match their checksums")

    async def _read(self, source: str, lent: FetchResponse, incoming: Incoming, until: float) -> None:
        """Raises NotFetchedError, when nothing is written here any more."""
        loop, (base, _) = asyncio.get_running_loop(), self._store.arena
        size = lent.slot_bytes - FIRST_WORD
        here = [base + offset + FIRST_WORD for offset in incoming.offsets]
        there = [lent.addresses[place] + FIRST_WORD for place in incoming.places]
        began = loop.time()
        if began >= until:
            raise NotFetchedError("late", "the batches before took the time")
        try:
            await self._link.read(lent.agent, here, there, size, until, incoming.give_up)
        except TimeoutError:
            self._measure(source, size * len(here), loop.time() - began)
            raise NotFetchedError("late", "the store's bytes did not come in time") from None
        except TransferError as error:
            await self._link.part(lent.agent)
            raise NotFetchedError("transfer", str(error)) from None
        self._measure(source, size * len(here), loop.time() - began)

    def _stub(self, source: str) -> KvbmServiceStub:
        return KvbmServiceStub(self._channels.get(source))

    async def _meet(self, source: str, lent: FetchResponse) -> None:
        old = self._agents.pop(source, "")
        if old:
            # The store was restarted.
            await self._link.part(old)
        try:
            await self._link.meet(lent.agent, lent.metadata)
        except TransferError as error:
            raise NotFetchedError("transfer", str(error)) from None
        self._agents[source] = lent.agent

    async def _give_back(self, source: str, request: ReturnRequest) -> None:
        try:
            await self._stub(source).Return(request, timeout=1.0)
        except grpc.aio.AioRpcError as error:
            # What is lent ends by itself.
            log.debug("fetch not returned", error=error.details())

    def _measure(self, source: str, size: int, seconds: float) -> None:
        speed, last = size / max(seconds, 1e-6), self.bytes_per_s.get(source)
        self.bytes_per_s[source] = speed if last is None else last + WEIGHT * (speed - last)


def _hash(digest: bytes) -> int:
    return int.from_bytes(digest[:8]) if len(digest) == DIGEST_BYTES else -1


def _refusal(error: KvmeshError) -> NotFetchedError:
    reasons = {
        ErrorCode.ERROR_CODE_NOT_FOUND: "absent",
        ErrorCode.ERROR_CODE_UNAVAILABLE: "unreachable",
        ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED: "late",
    }
    return NotFetchedError(reasons.get(error.code, "refused"), error.message)


def hashes_of(digests: bytes) -> list[int]:
    """The 64-bit names of digests."""
    return [_hash(digest) for digest in split(digests)]
