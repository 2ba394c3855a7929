"""Mooncake's store at the work of `benchmarks/tiers.py`; runs in the peer's own environment.

    PYTHON -m tier.mooncake_store MASTER SIZE ITEMS [SEGMENT]

MASTER is the host:port of its master. From and to registered memory, 32 blocks a call. The blocks lie in a
segment of this process, where Mooncake copies by memcpy; with `elsewhere`, in the one of another process, and
go there by TCP. With `hold`, this process has such a segment and does nothing else.
"""

from __future__ import annotations

import sys
from itertools import count

from mooncake.store import MooncakeDistributedStore  # pyright: ignore[reportMissingImports]
from tier.memory import MIB, Figures, Memory, Stopwatch, spread_runs
from tier.rounds import serve

BATCH = 32
# Registered memory for its own use.
BUFFER = 64 * MIB


class MooncakeStore:
    def __init__(self, master: str, memory: Memory, segment: int) -> None:
        self.memory = memory
        self.store = connect(master, segment)
        for blocks in (memory.source, memory.target):
            self.store.register_buffer(blocks.ctypes.data, blocks.nbytes)
        self.rounds = count()

    def round(self, threads: int) -> Figures:
        memory, number = self.memory, next(self.rounds)
        keys = [f"{number}/{item}" for item in range(memory.items)]

        def put(items: list[int]) -> None:
            done(self.store.batch_put_from(*arguments(items, memory.source.ctypes.data)), 0)

        def get(items: list[int]) -> None:
            done(self.store.batch_get_into(*arguments(items, memory.target.ctypes.data)), memory.size)

        def arguments(items: list[int], base: int) -> tuple[list[str], list[int], list[int]]:
            places = [base + item * memory.size for item in items]
            return [keys[item] for item in items], places, [memory.size] * len(items)

        watch = Stopwatch()
        spread_runs(memory.items, threads, BATCH, put)
        figures = watch.look("put", memory.gigabytes)
        spread_runs(memory.items, threads, BATCH, get)
        figures |= watch.look("get", memory.gigabytes)
        memory.check()
        self.store.remove_all(True)
        return figures


def connect(master: str, segment: int) -> MooncakeDistributedStore:
    store = MooncakeDistributedStore()
    if failed := store.setup("127.0.0.1", "P2PHANDSHAKE", segment, BUFFER, "tcp", "", master):
        raise RuntimeError(f"Mooncake's setup: {failed}")
    return store


def done(results: list[int], wanted: int) -> None:
    if any(result != wanted for result in results):
        raise RuntimeError(f"Mooncake: {sorted(set(results))} instead of {wanted}")


def main(master: str, size: int, items: int, segment: str = "own") -> None:
    room = 2 * size * items + 256 * MIB
    if segment == "hold":
        store = connect(master, room)
        serve(lambda _: {"held": float(store is not None)})
    else:
        serve(MooncakeStore(master, Memory(size, items), room if segment == "own" else 0).round)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
