"""Blocks of this store that others read out of its arena."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.core import Lent, StoreServer
from kvmesh.kvbm.link import Link, TransferError
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.kvbm_pb2 import (
    BlockNamespace,
    FetchRequest,
    FetchResponse,
    ReturnRequest,
    ReturnResponse,
)

MAX_BLOCKS = 4096
MAX_TTL_MS = 60_000
DIGEST_BYTES = 32

Namespace = tuple[tuple[str, str, str, str], tuple[int, int], list[int]]


class Lending:
    """Keeps what was lent until it is returned, or its time is over. Belongs to one event loop."""

    def __init__(self, store: StoreServer, link: Link) -> None:
        self._store = store
        self._link = link
        self._receipts = itertools.count(1)
        self._lent: dict[int, tuple[Lent, int, asyncio.TimerHandle]] = {}
        self.total = 0

    @property
    def blocks(self) -> int:
        """Lent now."""
        return sum(blocks for _, blocks, _ in self._lent.values())

    async def fetch(self, request: FetchRequest) -> FetchResponse:
        """Raises KvmeshError: INVALID_ARGUMENT, NOT_FOUND for the namespace, UNAVAILABLE without NIXL."""
        if not 1 <= len(request.hashes) <= MAX_BLOCKS:
            raise invalid(
                f"a fetch names 1 to {MAX_BLOCKS} blocks, not {len(request.hashes)}", param="hashes"
            )
        if not 1 <= request.ttl_ms <= MAX_TTL_MS:
            raise invalid(f"a fetch lasts 1 to {MAX_TTL_MS} ms, not {request.ttl_ms}", param="ttl_ms")
        namespace = from_proto(request.namespace)
        if namespace not in await asyncio.to_thread(self._store.namespaces, namespace[0][0]):
            raise KvmeshError(
                ErrorCode.ERROR_CODE_NOT_FOUND, f"this store has no such blocks of {namespace[0][0]!r}"
            )
        try:
            agent, metadata = await self._link.introduce()
        except TransferError as error:
            raise KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, f"no NIXL here: {error}") from None
        lent = await asyncio.to_thread(self._lend, namespace, list(request.hashes))
        response = FetchResponse(agent=agent, metadata=b"" if request.agent == agent else metadata)
        if lent is None:
            return response
        digests, (base, _) = lent.digests, self._store.arena
        response.digests.extend(split(digests))
        response.addresses.extend(base + offset for offset in lent.offsets)
        response.slot_bytes = lent.slot_bytes
        response.receipt = receipt = next(self._receipts)
        timer = asyncio.get_running_loop().call_later(request.ttl_ms / 1e3, self._end, receipt)
        blocks = len(digests) // DIGEST_BYTES
        self._lent[receipt] = (lent, blocks, timer)
        self.total += blocks
        return response

    async def take_back(self, request: ReturnRequest) -> ReturnResponse:
        lent, _, timer = self._lent.pop(request.receipt, (None, 0, None))
        if lent is None or timer is None:
            return ReturnResponse()
        timer.cancel()
        try:
            dropped = await asyncio.to_thread(lent.doubt, list(request.wrong)) if request.wrong else 0
        finally:
            lent.release()
        return ReturnResponse(dropped=dropped)

    def close(self) -> None:
        """End all that is lent. Idempotent."""
        for receipt in list(self._lent):
            self._end(receipt)

    def _lend(self, namespace: Namespace, hashes: list[int]) -> Lent | None:
        lent = self._store.lend(namespace, self._store.known(namespace, hashes))
        if lent is None or lent.digests:
            return lent
        lent.release()
        return None

    def _end(self, receipt: int) -> None:
        lent, _, timer = self._lent.pop(receipt)
        timer.cancel()
        lent.release()


def split(digests: bytes) -> list[bytes]:
    return [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]


def to_proto(namespace: Namespace) -> BlockNamespace:
    (model, revision, dtype, layout), (rank, ranks), segments = namespace
    fields: dict[str, Any] = {"model": model, "revision": revision, "dtype": dtype, "layout": layout}
    return BlockNamespace(**fields, rank=rank, ranks=ranks, segments=segments)


def from_proto(name: BlockNamespace) -> Namespace:
    return (
        (name.model, name.revision, name.dtype, name.layout),
        (name.rank, name.ranks),
        list(name.segments),
    )
