"""Blocks that this store reads out of the arenas of others."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import grpc.aio
import structlog

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
BATCH_BYTES = 64 << 20
# Of the host tier, the part one batch may take.
BATCH_PART = 8
# Fetches under way; more would only wait for the link.
MOST = 16
# How long one batch may take, however much time there is: engines wait for what has begun.
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
            lent = await KvbmServiceStub(self._channels.get(source)).Fetch(request, timeout=BATCH_S)
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
        last, missing = len(hashes) + 1, len(hashes)
        try:
            while True:
                known = await asyncio.to_thread(self._store.known, namespace, hashes)
                at = len(known) // DIGEST_BYTES
                missing = len(hashes) - at
                if not missing:
                    return True
                if missing >= last:
                    raise NotFetchedError("full", "what came was evicted at once")
                last, batch = missing, hashes[at : at + self._batch_blocks(namespace)]
                await self._fetch_batch(source, namespace, known[-DIGEST_BYTES:] or parent, batch, until)
        except NotFetchedError as error:
            self.failed[error.reason] += missing
            model = namespace[0][0]
            log.info(
                "blocks not fetched",
                source=source,
                model=model,
                blocks=missing,
                reason=error.reason,
                error=str(error),
            )
            return False

    def _batch_blocks(self, namespace: Namespace) -> int:
        block = sum(namespace[2])
        most = min(BATCH_BYTES, self._store.arena[1] // BATCH_PART)
        return max(1, min(MAX_BLOCKS, most // block))

    async def _fetch_batch(
        self, source: str, namespace: Namespace, parent: bytes, hashes: list[int], until: float
    ) -> None:
        """Read the leading blocks of a chain behind `parent`. Raises NotFetchedError."""
        left = min(until - asyncio.get_running_loop().time(), BATCH_S)
        speed, size = self.bytes_per_s.get(source), sum(namespace[2]) * len(hashes)
        if left <= 0:
            raise NotFetchedError("late", "the time is over")
        if speed and size / speed > left:
            # Computing them is faster. A link may get better, so the next is told of less than this one was.
            self.bytes_per_s[source] = speed * (1 + WEIGHT)
            raise NotFetchedError("slow", f"{size} bytes would take {size / speed:.3f} s of {left:.3f}")
        deadline = asyncio.get_running_loop().time() + left
        stub = KvbmServiceStub(self._channels.get(source))
        request = FetchRequest(
            namespace=to_proto(namespace),
            hashes=hashes,
            ttl_ms=min(max(round(left * 1e3), 1) + 1000, MAX_TTL_MS),
            agent=self._agents.get(source, ""),
        )
        if not self._link.knows(request.agent):
            request.agent = ""
        try:
            lent: FetchResponse = await stub.Fetch(request, timeout=left)
        except grpc.aio.AioRpcError as error:
            raise _refusal(KvmeshError.from_rpc(error, "kvbm")) from None
        if not lent.receipt:
            raise NotFetchedError("absent", "the store has none of them")
        wrong: list[int] = []
        try:
            wrong = await self._take(source, namespace, parent, hashes, lent, deadline)
        finally:
            await self._give_back(stub, ReturnRequest(receipt=lent.receipt, wrong=wrong))
        if wrong:
            raise NotFetchedError("corrupt", f"{len(wrong)} blocks did not match their checksums")

    async def _take(
        self,
        source: str,
        namespace: Namespace,
        parent: bytes,
        hashes: list[int],
        lent: FetchResponse,
        deadline: float,
    ) -> list[int]:
        """Read lent blocks; places of those that are wrong. Raises NotFetchedError."""
        digests, count = list(lent.digests), len(lent.digests)
        asked = [digest for digest, number in zip(digests, hashes, strict=False) if _hash(digest) == number]
        if asked != digests or len(lent.addresses) != count or count > len(hashes):
            raise NotFetchedError("refused", "the store answered of other blocks")
        if not self._link.knows(lent.agent):
            await self._meet(source, lent)
        incoming: Incoming = await asyncio.to_thread(self._store.expect, namespace, parent, b"".join(digests))
        try:
            places, offsets = incoming.places, incoming.offsets
            if not places:
                raise NotFetchedError("full", "memory has no room, or they are on their way")
            if lent.slot_bytes != incoming.slot_bytes:
                raise NotFetchedError("refused", "the store's slots have another size")
            base, _ = self._store.arena
            size = lent.slot_bytes - FIRST_WORD
            here = [base + offset + FIRST_WORD for offset in offsets]
            there = [lent.addresses[place] + FIRST_WORD for place in places]
            loop = asyncio.get_running_loop()
            began = loop.time()
            try:
                await self._link.read(lent.agent, here, there, size, deadline, incoming.give_up)
            except TimeoutError:
                self._measure(source, size * len(places), loop.time() - began)
                raise NotFetchedError("late", "the store's bytes did not come in time") from None
            except TransferError as error:
                await self._link.part(lent.agent)
                raise NotFetchedError("transfer", str(error)) from None
            self._measure(source, size * len(places), loop.time() - began)
            wrong = await asyncio.to_thread(self._store.arrived, incoming)
        finally:
            incoming.release()
        good = len(places) - len(wrong)
        self.fetched += good
        self.fetched_bytes += good * lent.slot_bytes
        return wrong

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

    async def _give_back(self, stub: KvbmServiceStub, request: ReturnRequest) -> None:
        try:
            await stub.Return(request, timeout=1.0)
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
