"""LMCache's stores at the work of `benchmarks/tiers.py`; runs in the peer's own environment.

    PYTHON -m tier.lmcache_store memory|disk|native SIZE ITEMS [FOLDER]

`memory` is its LocalCPUBackend, `disk` its LocalDiskBackend, and `native` its C++ file connector with four
workers, both with O_DIRECT. Its file connector takes 32 blocks a call; the others take one.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import shutil
import sys
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmcache.lmcache_fs import LMCacheFSClient  # pyright: ignore[reportMissingImports]
from lmcache.utils import CacheEngineKey  # pyright: ignore[reportMissingImports]
from lmcache.v1.config import LMCacheEngineConfig  # pyright: ignore[reportMissingImports]
from lmcache.v1.metadata import LMCacheMetadata  # pyright: ignore[reportMissingImports]
from lmcache.v1.storage_backend.local_cpu_backend import (  # pyright: ignore[reportMissingImports]
    LocalCPUBackend,
)
from lmcache.v1.storage_backend.local_disk_backend import (  # pyright: ignore[reportMissingImports]
    LocalDiskBackend,
)
from tier.memory import GIB, Figures, Memory, Stopwatch, spread, spread_runs
from tier.rounds import serve

PAGE = 4096
BATCH = 32
WORKERS = 4


class Staged:
    """Blocks go through LMCache's own memory, which an engine's pages are copied to and from."""

    def __init__(self, memory: Memory, folder: Path | None) -> None:
        self.memory, self.folder = memory, folder
        self.shape = torch.Size([memory.size])
        # The disk's staging memory keeps nothing.
        room = 1.3 * memory.items * memory.size / GIB + 0.25
        config = LMCacheEngineConfig.from_defaults(
            local_cpu=folder is None,
            max_local_cpu_size=room,
            local_disk=None if folder is None else str(folder),
            # Its count of what lies there only grows, and at the limit it drops puts.
            max_local_disk_size=100_000,
            extra_config={"use_odirect": True, "local_cpu.pinned_align_bytes": PAGE},
        )
        metadata = LMCacheMetadata("m", 1, 1, 0, 0, torch.uint8, (1, 2, 256, 1, 1))
        self.host = LocalCPUBackend(config, metadata, "cpu")
        self.store: Any = self.host
        if folder is not None:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, daemon=True).start()
            self.store = LocalDiskBackend(config, loop, self.host, "cpu", metadata=metadata)
        self.rounds = count()

    def round(self, threads: int) -> Figures:
        memory, number = self.memory, next(self.rounds)
        keys = [
            CacheEngineKey("m", 1, 0, number * memory.items + item, torch.uint8)
            for item in range(memory.items)
        ]

        def put(item: int) -> None:
            block = self.host.allocate(self.shape, torch.uint8)
            if block is None:
                raise RuntimeError("LMCache has no room")
            ctypes.memmove(block.data_ptr, memory.source[item].ctypes.data, memory.size)
            self.store.submit_put_task(keys[item], block)
            block.ref_count_down()

        def get(item: int) -> None:
            block = self.store.get_blocking(keys[item])
            ctypes.memmove(memory.target[item].ctypes.data, block.data_ptr, memory.size)
            block.ref_count_down()

        watch = Stopwatch()
        spread(memory.items, threads, put)
        while not all(self.store.contains(key) for key in keys):
            time.sleep(0.001)
        if self.folder is not None:
            os.sync()
        figures = watch.look("put", memory.gigabytes)
        spread(memory.items, threads, get)
        figures |= watch.look("get", memory.gigabytes)
        memory.check()
        for key in keys:
            self.store.remove(key)
        return figures


class Native:
    """Blocks go between the caller's memory and files."""

    def __init__(self, memory: Memory, folder: Path) -> None:
        self.memory = memory
        self.client = LMCacheFSClient(str(folder), WORKERS, "", True, 0)
        self.ready = select.poll()
        self.ready.register(self.client.event_fd(), select.POLLIN)
        self.source, self.target = aligned(memory.source), aligned(memory.target)
        self.rounds = count()

    def round(self, threads: int) -> Figures:
        """One thread calls whatever `threads` says: it has threads of its own."""
        memory, number = self.memory, next(self.rounds)
        keys = [f"m@1@0@{number:08x}{item:08x}@uint8" for item in range(memory.items)]

        def put(items: list[int]) -> None:
            self.client.submit_batch_set(*arguments(items, self.source))
            self.wait()

        def get(items: list[int]) -> None:
            self.client.submit_batch_get(*arguments(items, self.target))
            self.wait()

        def arguments(items: list[int], blocks: np.ndarray) -> tuple[list[str], list[memoryview]]:
            return [keys[item] for item in items], [memoryview(blocks[item]) for item in items]

        watch = Stopwatch()
        spread_runs(memory.items, 1, BATCH, put)
        os.sync()
        figures = watch.look("put", memory.gigabytes)
        spread_runs(memory.items, 1, BATCH * threads, get)
        figures |= watch.look("get", memory.gigabytes)
        if not np.array_equal(self.target, self.source):
            raise RuntimeError("what came back is not what was put")
        self.target[:] = 1
        self.client.submit_batch_delete(keys)
        self.wait()
        return figures

    def wait(self) -> None:
        while True:
            self.ready.poll()
            os.read(self.client.event_fd(), 8)
            if done := self.client.drain_completions():
                failed = [outcome for outcome in done if not outcome[1]]
                if failed:
                    raise RuntimeError(f"LMCache: {failed[0]}")
                return


def aligned(blocks: np.ndarray) -> np.ndarray:
    """A copy that begins at a page, as direct I/O wants."""
    room = np.empty(blocks.nbytes + PAGE, np.uint8)
    start = -room.ctypes.data % PAGE
    copy = room[start : start + blocks.nbytes].reshape(blocks.shape)
    copy[:] = blocks
    return copy


def main(kind: str, size: int, items: int, folder: Path | None) -> None:
    memory = Memory(size, items)
    if folder is not None:
        folder.mkdir()
    try:
        if kind == "native" and folder is not None:
            serve(Native(memory, folder).round)
        else:
            serve(Staged(memory, folder).round)
    finally:
        if folder is not None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]) if sys.argv[4:] else None)
