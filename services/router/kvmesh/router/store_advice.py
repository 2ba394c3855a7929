"""Tells stores, while a placed request is on its way, what it means for them.

That is what it will soon want from lower tiers, which store of another node has more of it, and what is known
of its return.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import grpc.aio
import structlog
from prometheus_client import Counter

from kvmesh.common import metrics
from kvmesh.common.grpc.client import Channels
from kvmesh.common.tasks import cancel
from kvmesh.router.index import IndexFeed
from kvmesh.router.model import stable_hash
from kvmesh.v1.common_pb2 import CachedTokens, WorkerInfo
from kvmesh.v1.kvbm_pb2 import HintRequest, PrefetchRequest
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceStub
from kvmesh.v1.router_pb2 import RouteRequest

log = structlog.get_logger()

# A store that takes longer hears of the prompt by the engine's own look-up.
TIMEOUT_S = 1.0
# Calls under way at once; more are dropped: a store that does not answer must not cost memory.
MOST = 256
# A hint is said of one block in so many, from the prompt's last back: it holds for what follows them, too.
HINTED_EVERY = 16

_Call = Callable[[KvbmServiceStub], Awaitable[Any]]


class StoreAdvice:
    """Sends and forgets. Belongs to one event loop; no call blocks or raises."""

    def __init__(self, feed: IndexFeed, channels: Channels) -> None:
        self._feed = feed
        self._channels = channels
        self._under_way: set[asyncio.Task[None]] = set()
        self._prefetches = metrics.router().prefetches
        self._hints = metrics.router().hints

    def placed(
        self,
        request: RouteRequest,
        prefill: WorkerInfo,
        decode: WorkerInfo,
        block_tokens: int,
        cached: CachedTokens,
        within_ms: float,
    ) -> None:
        """A prompt will be computed on `prefill`, which has `cached` tokens of it, and answered on `decode`.

        `within_ms` is the prediction of its first token. What is known of its return is told on both nodes.
        """
        if request.HasField("hint") and request.block_hashes:
            # First, so that what a prefetch uses is used under it.
            self._hint(request, {prefill.node, decode.node}, prefill.model.name)
        self._prefetch(request, prefill, block_tokens, cached, within_ms)

    @property
    def under_way(self) -> int:
        """Calls no store has answered yet."""
        return len(self._under_way)

    async def close(self) -> None:
        await cancel(*self._under_way)

    def _hint(self, request: RouteRequest, nodes: Collection[str], model: str) -> None:
        said = request.hint
        hint = HintRequest(
            model=model,
            hashes=request.block_hashes[::-HINTED_EVERY],
            session=stable_hash(request.session_id) if request.session_id else None,
            returns=said.returns if said.HasField("returns") else None,
            tool_call=said.tool_call,
            returns_in_s=said.returns_in_s if said.HasField("returns_in_s") else None,
        )
        for node in nodes:
            self._send(node, lambda stub: stub.Hint(hint, timeout=TIMEOUT_S), self._hints)

    def _prefetch(
        self,
        request: RouteRequest,
        worker: WorkerInfo,
        block_tokens: int,
        cached: CachedTokens,
        within_ms: float,
    ) -> None:
        """Nothing is sent where neither a lower tier has any of it nor another node's store more of it."""
        hashes = request.block_hashes
        tokens = cached.device + cached.host + cached.nvme + cached.network
        blocks = tokens // block_tokens
        source, there = self._feed.source_for(worker.node, hashes)
        if there <= blocks:
            source = ""
            if not (cached.nvme or cached.network):
                return
        prefetch = PrefetchRequest(
            model=worker.model.name,
            hashes=hashes[: there if source else blocks],
            source=source,
            within_ms=min(max(round(within_ms), 1), 3_600_000),
        )
        self._send(worker.node, lambda stub: stub.Prefetch(prefetch, timeout=TIMEOUT_S), self._prefetches)

    def _send(self, node: str, call: _Call, count: Counter) -> None:
        for address in self._feed.stores_of(node):
            if len(self._under_way) >= MOST:
                count.labels("shed").inc()
                return
            task = asyncio.create_task(self._call(address, call, count), name="store-advice")
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _call(self, address: str, call: _Call, count: Counter) -> None:
        try:
            await call(KvbmServiceStub(self._channels.get(address)))
        except grpc.aio.AioRpcError as error:
            count.labels("failed").inc()
            log.debug("advice not taken", store=address, error=error.details())
        else:
            count.labels("sent").inc()
