"""Our host and nvme tier by `TieredStore`, checksums on."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path

from tier.memory import KIB, MIB, Figures, Memory, Stopwatch, names, spread

from kvmesh.core import TieredStore

# What a block takes beside its bytes, at most.
HEADER = 8 * KIB
# Room of a tier that is in pieces of no block's size.
PIECES = 4 * MIB


class HostTier:
    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        # A little more than one round, so that every round but the first evicts.
        room = int(memory.items * (memory.size + HEADER) * 1.15) + 32 * PIECES
        self.store = TieredStore(room, memory.size, policy="lru")
        self.rounds = count()

    def round(self, threads: int) -> Figures:
        memory, store = self.memory, self.store
        digests = names(next(self.rounds) * memory.items, memory.items)
        watch = Stopwatch()
        spread(memory.items, threads, lambda item: store.put(digests[item], memory.source[item]))
        figures = watch.look("put", memory.gigabytes)
        spread(memory.items, threads, lambda item: store.get(digests[item], memory.target[item]))
        figures |= watch.look("get", memory.gigabytes)
        memory.check()
        return figures


class DiskTier:
    def __init__(self, memory: Memory, folder: Path) -> None:
        self.memory, self.folder = memory, folder
        self.rounds = count()

    def round(self, threads: int) -> Figures:
        memory, path = self.memory, self.folder / f"tier-{next(self.rounds)}"
        room = 2 * memory.items * (memory.size + HEADER) + 64 * PIECES
        digests = names(0, memory.items)
        store = TieredStore(192 * MIB, memory.size, path, room, policy="lru")
        try:
            # The slabs' first writes allocate; a tier in use has them behind it.
            warm = names(1 << 32, room // (memory.size + HEADER) - 64)
            for at, digest in enumerate(warm):
                store.put(digest, memory.source[at % memory.items])
            store.flush()
            watch = Stopwatch()
            spread(memory.items, threads, lambda item: store.put(digests[item], memory.source[item]))
            store.flush()
            figures = watch.look("put", memory.gigabytes)
            below = [at for at, place in enumerate(store.contains(digests)) if place == "nvme"]
            watch = Stopwatch()
            spread(len(below), threads, lambda item: store.get(digests[below[item]], memory.target[item]))
            return figures | watch.look("get", len(below) * memory.size / 1e9)
        finally:
            store.close()
            shutil.rmtree(path)
