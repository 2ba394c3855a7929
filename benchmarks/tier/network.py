"""Our network tier: one store's process reads another's memory by NIXL, and an engine reads what came."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc.aio
import numpy as np
from tier.memory import MIB, Figures, Memory, names

import harness  # noqa: F401 - makes the tests' fixtures importable
from fixtures.kvbm import Kvbm
from fixtures.nats import NatsServer
from harness import cpu_seconds
from kvmesh.core import Pages, StoreClient
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.kvbm_pb2 import FlushRequest, GetStatsRequest, PrefetchRequest
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceStub

MODEL = "bench"
# Twice the blocks, so that the store takes its largest batches.
ROOM = 1024 * MIB
PATIENCE_S = 60.0
LOOK_S = 0.0002


class TwoStores:
    """The first has all of `memory.source`; the second, once a round, none of it."""

    def __init__(self, memory: Memory, stores: list[Kvbm], stub: KvbmServiceStub) -> None:
        self._memory, self._stub = memory, stub
        self._source = stores[0].address
        self._pids = [store.process.pid for store in stores if store.process is not None]
        self._digests = names(0, memory.items)
        self._reader = _engine(stores[1], memory.size)
        writer = _engine(stores[0], memory.size)
        everything = list(range(memory.items))
        stored = writer.offload(None, b"".join(self._digests), _pages(memory, memory.source), everything)
        writer.close()
        if stored != (memory.items, 0, 0):
            raise RuntimeError(f"stored, there, without room: {stored}")
        self._target = _pages(memory, memory.target)

    async def round(self, chains: int) -> Figures:
        """`get`: until the second store has all, checked; `engine`: until an engine's pages have.

        All blocks are so many chains, asked for at once.
        """
        memory = self._memory
        ends = [memory.items * (number + 1) // chains for number in range(chains)]
        await self._stub.Flush(FlushRequest(tier=Tier.TIER_HOST), timeout=PATIENCE_S)
        within = round(1e3 * PATIENCE_S)
        requests = [
            PrefetchRequest(
                model=MODEL, digests=self._digests[first:end], within_ms=within, source=self._source
            )
            for first, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        cpu, began = cpu_seconds(self._pids), time.perf_counter()
        await asyncio.gather(*(self._stub.Prefetch(request, timeout=PATIENCE_S) for request in requests))
        for end in ends:
            # Engines ask the store's own threads; the process that fetches is not disturbed.
            while not self._reader.lookup(self._digests[end - 1]):
                if time.perf_counter() - began > PATIENCE_S:
                    stats = await self._stub.GetStats(GetStatsRequest(), timeout=PATIENCE_S)
                    raise RuntimeError(f"blocks did not come: {dict(stats.network.failed)}")
                await asyncio.sleep(LOOK_S)
            # The last is on its way; a load waits for it.
            self._load(end - 1, end)
        here, used = time.perf_counter(), cpu_seconds(self._pids) - cpu
        self._load(0, memory.items)
        loaded = time.perf_counter()
        memory.check()
        return {
            "get": memory.gigabytes / (here - began),
            "get cpu": used / memory.gigabytes,
            "engine": memory.gigabytes / (loaded - began),
        }

    def close(self) -> None:
        self._reader.close()

    def _load(self, first: int, end: int) -> None:
        """Copies the blocks from `first` to `end` to the engine's pages."""
        lease = self._reader.lease(b"".join(self._digests[first:end]))
        if lease is None:
            raise RuntimeError("blocks that came are gone")
        lease.load(self._target, list(range(first, end)), 0, 1)
        lease.release()


@asynccontextmanager
async def two_stores(memory: Memory, home: Path) -> AsyncIterator[TwoStores]:
    """On two nodes of a bus of their own, in folders made below `home`."""
    nats = NatsServer(home)
    async with AsyncExitStack() as cleanup:
        cleanup.callback(nats.stop)
        nats.start()
        stores = []
        for name in ("a", "b"):
            folder = Path(tempfile.mkdtemp(dir=home))
            store = Kvbm(folder, nats.url, ROOM)
            store.environment |= {
                "KVMESH_NODE": name,
                "KVMESH_KVBM__ID": f"kvbm-{name}",
                "KVMESH_KVBM__SHM_DIR": "/dev/shm",
            }
            await store.start()
            cleanup.callback(store.end)
            stores.append(store)
        channel = await cleanup.enter_async_context(grpc.aio.insecure_channel(stores[1].address))
        pair = TwoStores(memory, stores, KvbmServiceStub(channel))
        cleanup.callback(pair.close)
        yield pair


def _engine(store: Kvbm, size: int) -> StoreClient:
    client = StoreClient(
        store.socket,
        model=MODEL,
        revision="1",
        dtype="bytes",
        layout="whole",
        rank=0,
        ranks=1,
        segments=[size],
        engine=os.getpid(),
        timeout_s=PATIENCE_S,
    )
    client.connect()
    return client


def _pages(memory: Memory, blocks: np.ndarray) -> Pages:
    return Pages([blocks], [blocks.ctypes.data], [memory.size], [memory.size], memory.items)
