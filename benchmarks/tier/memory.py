"""The work that every store of `benchmarks/tiers.py` does; peers have nothing of ours but this, and numpy."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from random import Random

import numpy as np

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
Figures = dict[str, float]


def spread(items: int, threads: int, work: Callable[[int], object]) -> float:
    """Seconds to run `work` for every item in scattered order on so many threads."""
    return spread_runs(items, threads, 1, lambda run: work(run[0]))


def spread_runs(items: int, threads: int, length: int, work: Callable[[list[int]], object]) -> float:
    """The same for runs of `length` items, for stores that take several a call."""
    order = list(range(items))
    Random(1).shuffle(order)
    runs = [order[start : start + length] for start in range(0, items, length)]

    def run(part: list[list[int]]) -> None:
        for items in part:
            work(items)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(int, "0" * threads))
        began = time.perf_counter()
        list(pool.map(run, [runs[start::threads] for start in range(threads)]))
        return time.perf_counter() - began


def names(start: int, items: int) -> list[bytes]:
    return [sha256(number.to_bytes(8, "little")).digest() for number in range(start, start + items)]


class Memory:
    """Blocks of the caller's, written to once so that no page of them is missing."""

    def __init__(self, size: int, items: int) -> None:
        self.size, self.items = size, items
        self.source = np.random.default_rng(1).integers(0, 256, (items, size), np.uint8)
        self.target = np.ones((items, size), np.uint8)

    @property
    def gigabytes(self) -> float:
        return self.items * self.size / 1e9

    def check(self) -> None:
        """Raises RuntimeError unless the target has the source's bytes; then it has others."""
        step = max(1, self.items // 7)
        if not np.array_equal(self.target[::step], self.source[::step]):
            raise RuntimeError("what came back is not what was put")
        self.target[::step] = 1


class Stopwatch:
    """Wall and processor time of this process, between looks."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def look(self, what: str, gigabytes: float) -> Figures:
        """GB/s and CPU s/GB since the last look."""
        wall, cpu = time.perf_counter(), time.process_time()
        figures = {what: gigabytes / (wall - self._wall), f"{what} cpu": (cpu - self._cpu) / gigabytes}
        self._wall, self._cpu = wall, cpu
        return figures


class Memcpy:
    """The limit of every store in memory."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def round(self, threads: int) -> Figures:
        memory = self.memory
        scattered = Random(2).sample(range(memory.items), memory.items)
        taken = spread(
            memory.items,
            threads,
            lambda item: np.copyto(memory.target[scattered[item]], memory.source[item]),
        )
        return dict.fromkeys(("put", "get"), memory.gigabytes / taken)
