"""Tells a store what a placed prompt will soon want from its lower tiers, and which store of another node has
more of it, while the request is on its way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc.aio
import structlog

from kvmesh.common import metrics
from kvmesh.common.grpc.client import Channels
from kvmesh.common.tasks import cancel
from kvmesh.router.index import IndexFeed
from kvmesh.v1.common_pb2 import CachedTokens, WorkerInfo
from kvmesh.v1.kvbm_pb2 import PrefetchRequest
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceStub

log = structlog.get_logger()

# A store that takes longer hears of the prompt by the engine's own look-up.
TIMEOUT_S = 1.0
# Hints under way at once; more are dropped: a store that does not answer must not cost memory.
MOST = 256


class Prefetches:
    """Sends hints and forgets them. Belongs to one event loop; no call blocks or raises."""

    def __init__(self, feed: IndexFeed, channels: Channels) -> None:
        self._feed = feed
        self._channels = channels
        self._under_way: set[asyncio.Task[None]] = set()
        self._count = metrics.router().prefetches

    def placed(
        self,
        worker: WorkerInfo,
        hashes: Sequence[int],
        block_tokens: int,
        cached: CachedTokens,
        within_ms: float,
    ) -> None:
        """A prompt of these blocks will be computed on `worker`, which has `cached` tokens of it.

        `within_ms` is the prediction of its first token. Nothing is sent where neither a lower tier has any
        of it nor another node's store more of it.
        """
        tokens = cached.device + cached.host + cached.nvme + cached.network
        blocks = tokens // block_tokens
        source, there = self._feed.source_for(worker.node, hashes)
        if there <= blocks:
            source = ""
            if not (cached.nvme or cached.network):
                return
        request = PrefetchRequest(
            model=worker.model.name,
            hashes=hashes[: there if source else blocks],
            source=source,
            within_ms=min(max(round(within_ms), 1), 3_600_000),
        )
        for address in self._feed.stores_of(worker.node):
            if len(self._under_way) >= MOST:
                self._count.labels("shed").inc()
                return
            task = asyncio.create_task(self._send(address, request), name="prefetch")
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    @property
    def under_way(self) -> int:
        """Hints no store has answered yet."""
        return len(self._under_way)

    async def close(self) -> None:
        await cancel(*self._under_way)

    async def _send(self, address: str, request: PrefetchRequest) -> None:
        stub = KvbmServiceStub(self._channels.get(address))
        try:
            await stub.Prefetch(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            self._count.labels("failed").inc()
            log.debug("prefetch not taken", store=address, error=error.details())
        else:
            self._count.labels("sent").inc()
