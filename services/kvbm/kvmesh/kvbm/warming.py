"""Vacant memory is filled ahead of traffic: from the disk, from object storage, or from another store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc.aio

from kvmesh.common.config import ObjectTierConfig
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.grpc.client import Channels
from kvmesh.core import StoreServer, Warming
from kvmesh.kvbm import objects
from kvmesh.kvbm.fetching import Fetching, hashes_of
from kvmesh.kvbm.lending import DIGEST_BYTES, from_proto, to_proto
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.kvbm_pb2 import HottestRequest, HottestResponse, WarmResponse
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceStub

# Blocks that are read between two answers.
STEP_BLOCKS = 64
# Blocks that another store is asked to name, and how long all of it may take.
MOST_BLOCKS = 1 << 20
LONG_S = 3600.0


class Warmer:
    """Brings blocks and says how far it is; every source takes room that is vacant, and none else."""

    def __init__(
        self, store: StoreServer, settings: ObjectTierConfig, fetching: Fetching, channels: Channels
    ) -> None:
        self._store = store
        self._settings = settings
        self._fetching = fetching
        self._channels = channels

    def warm(self, model: str, source: str) -> AsyncIterator[WarmResponse]:
        """Raises KvmeshError: UNAVAILABLE when the source is not to be had, INVALID_ARGUMENT for no URL."""
        if source and "://" not in source:
            return self._from_store(model, source)
        return self._from_below(model, source)

    async def hottest(self, model: str, most: int) -> AsyncIterator[HottestResponse]:
        """What this store has, for one that asks."""
        runs = await asyncio.to_thread(self._store.hottest, model, min(most or MOST_BLOCKS, MOST_BLOCKS))
        for namespace, parent, digests in runs:
            split = (digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES))
            yield HottestResponse(namespace=to_proto(namespace), parent=parent, digests=split)

    async def _from_below(self, model: str, url: str) -> AsyncIterator[WarmResponse]:
        plan = await asyncio.to_thread(self._plan, model, url)
        to_come = 1
        while to_come:
            brought, failed, to_come = await asyncio.to_thread(self._store.warm, plan, STEP_BLOCKS)
            yield WarmResponse(brought=brought, failed=failed, to_come=to_come, left=plan.left)

    def _plan(self, model: str, url: str) -> Warming:
        if not url:
            return self._store.warming(model)
        try:
            return self._store.warming(model, objects.options(self._settings, url))
        except OSError as error:
            raise KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, str(error)) from None
        except ValueError as error:
            raise invalid(str(error), param="source") from None

    async def _from_store(self, model: str, source: str) -> AsyncIterator[WarmResponse]:
        stub = KvbmServiceStub(self._channels.get(source))
        asked = stub.Hottest(HottestRequest(model=model, most_blocks=MOST_BLOCKS), timeout=LONG_S)
        try:
            runs = [run async for run in asked]
        except grpc.aio.AioRpcError as error:
            raise KvmeshError.from_rpc(error, "kvbm") from None
        to_come, left = sum(len(run.digests) for run in runs), 0
        for run in runs:
            namespace, wanted = from_proto(run.namespace), len(run.digests)
            try:
                await asyncio.to_thread(self._store.open, namespace)
            except ValueError:
                # This store is too small for such blocks.
                room = 0
            else:
                room = await asyncio.to_thread(self._store.room, namespace)
            hashes = hashes_of(b"".join(run.digests[:room]))
            to_come -= wanted
            left += wanted - len(hashes)
            missing = await self._fetching.fetch(source, namespace, run.parent, hashes, LONG_S)
            yield WarmResponse(brought=len(hashes) - missing, failed=missing, to_come=to_come, left=left)
        if not runs:
            yield WarmResponse()
