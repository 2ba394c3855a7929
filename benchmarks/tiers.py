"""Speed of the host and the nvme tier, checksums on, beside what memory and the disk can do.

    python benchmarks/tiers.py [--json] [--quick] [--dir FOLDER]

Blocks of 64 KiB, 512 KiB and 2 MiB, put and got in scattered order through `TieredStore` by 1 and 2
threads, from and to the caller's memory. Limits: memcpy of the same bytes in the same pattern; `fio` with
the same block size and depth where it is installed, else positioned direct I/O on as many threads. FOLDER
is where the disk tier lies (default: the temporary directory).

The host tier is full all the time, so every put evicts, by LRU: other policies would refuse some of the
blocks. Disk puts count until all is on the disk (`flush`); a writer's batch has depth 32. Disk gets are of
blocks that are not in memory; each caller has one under way.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import count
from pathlib import Path
from random import Random

import numpy as np

from harness import Cell, Report, interleave, main
from kvmesh.core import TieredStore

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZES = {"64 KiB": 64 * KIB, "512 KiB": 512 * KIB, "2 MiB": 2 * MIB}
THREADS = (1, 2)
HOST_GOAL, DISK_GOAL = 0.80, 0.90
WRITE_DEPTH = 32
Figures = dict[str, float]


def spread(items: int, threads: int, work: Callable[[int], object]) -> float:
    """Seconds to run `work` for every item in scattered order on so many threads."""
    order = list(range(items))
    Random(1).shuffle(order)

    def run(part: list[int]) -> None:
        for item in part:
            work(item)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(int, "0" * threads))
        began = time.perf_counter()
        list(pool.map(run, [order[start::threads] for start in range(threads)]))
        return time.perf_counter() - began


def names(start: int, items: int) -> list[bytes]:
    return [sha256(number.to_bytes(8, "little")).digest() for number in range(start, start + items)]


class Memory:
    """Blocks of the caller's, written to once so that no page of them is missing."""

    def __init__(self, size: int, items: int) -> None:
        self.size, self.items = size, items
        self.source = np.random.default_rng(1).integers(0, 256, (items, size), np.uint8)
        self.target = np.ones((items, size), np.uint8)

    def copy(self, threads: int) -> Figures:
        scattered = Random(2).sample(range(self.items), self.items)
        taken = spread(
            self.items,
            threads,
            lambda item: np.copyto(self.target[scattered[item]], self.source[item]),
        )
        return {"speed": self.items * self.size / taken / 1e9}


def per_gb(memory: Memory, cpu: float) -> float:
    return cpu / (memory.items * memory.size / 1e9)


class HostTier:
    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        # A little more than one round, so that every round but the first evicts.
        room = int(memory.items * (memory.size + 8 * KIB) * 1.15) + 32 * 4 * MIB
        self.store = TieredStore(room, memory.size, policy="lru")
        self.rounds = count()

    def round(self, threads: int) -> Figures:
        memory, store = self.memory, self.store
        digests = names(next(self.rounds) * memory.items, memory.items)
        cpu = time.process_time()
        put = spread(memory.items, threads, lambda item: store.put(digests[item], memory.source[item]))
        between = time.process_time()
        got = spread(memory.items, threads, lambda item: store.get(digests[item], memory.target[item]))
        after = time.process_time()
        assert np.array_equal(memory.target[:: memory.items // 7], memory.source[:: memory.items // 7])
        total = memory.items * memory.size / 1e9
        return {
            "put": total / put,
            "get": total / got,
            "put cpu": per_gb(memory, between - cpu),
            "get cpu": per_gb(memory, after - between),
        }


class DiskTier:
    def __init__(self, memory: Memory, folder: Path) -> None:
        self.memory, self.folder = memory, folder
        self.rounds = count()

    def round(self, threads: int) -> Figures:
        memory, path = self.memory, self.folder / f"tier-{next(self.rounds)}"
        room = 2 * memory.items * (memory.size + 8 * KIB) + 64 * 4 * MIB
        digests = names(0, memory.items)
        store = TieredStore(192 * MIB, memory.size, path, room, policy="lru")
        try:
            # The slabs' first writes allocate; a tier in use has them behind it.
            warm = names(1 << 32, room // (memory.size + 8 * KIB) - 64)
            for at, digest in enumerate(warm):
                store.put(digest, memory.source[at % memory.items])
            store.flush()

            def put() -> None:
                spread(memory.items, threads, lambda item: store.put(digests[item], memory.source[item]))
                store.flush()

            cpu, began = time.process_time(), time.perf_counter()
            put()
            put_s, between = time.perf_counter() - began, time.process_time()
            below = [at for at, place in enumerate(store.contains(digests)) if place == "nvme"]
            got = spread(
                len(below), threads, lambda item: store.get(digests[below[item]], memory.target[item])
            )
            after = time.process_time()
            total = memory.items * memory.size / 1e9
            return {
                "put": total / put_s,
                "get": len(below) * memory.size / 1e9 / got,
                "put cpu": per_gb(memory, between - cpu),
                "get cpu": (after - between) / (len(below) * memory.size / 1e9),
            }
        finally:
            store.close()
            shutil.rmtree(path)


class RawDisk:
    """The disk alone: one allocated file, written and read in scattered order past the page cache."""

    def __init__(self, memory: Memory, folder: Path) -> None:
        self.memory, self.path = memory, folder / "raw"
        descriptor = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_DIRECT)
        os.posix_fallocate(descriptor, 0, memory.items * memory.size)
        os.close(descriptor)
        self.run("write", WRITE_DEPTH)

    def run(self, what: str, depth: int) -> float:
        """GB/s."""
        return self._fio(what, depth) if shutil.which("fio") else self._loop(what, depth)

    def _fio(self, what: str, depth: int) -> float:
        memory = self.memory
        command = [
            *("fio", "--name=raw", f"--filename={self.path}", f"--rw=rand{what}", "--direct=1"),
            *(f"--bs={memory.size}", f"--iodepth={depth}", "--ioengine=io_uring", "--end_fsync=1"),
            *(f"--size={memory.items * memory.size}", "--output-format=json"),
        ]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        return json.loads(output)["jobs"][0][what]["bw_bytes"] / 1e9

    def _loop(self, what: str, depth: int) -> float:
        memory, size = self.memory, self.memory.size
        descriptor = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        buffers = [mmap.mmap(-1, size) for _ in range(depth)]
        for buffer in buffers:
            buffer.write(memory.source[0].tobytes())
        free = list(buffers)

        def move(item: int) -> None:
            buffer = free.pop()
            if what == "write":
                os.pwritev(descriptor, [buffer], item * size)
            else:
                os.preadv(descriptor, [buffer], item * size)
            free.append(buffer)

        try:
            began = time.perf_counter()
            spread(memory.items, depth, move)
            if what == "write":
                os.fdatasync(descriptor)
            return memory.items * size / (time.perf_counter() - began) / 1e9
        finally:
            os.close(descriptor)

    def round(self, threads: int) -> Figures:
        return {"put": self.run("write", WRITE_DEPTH), "get": self.run("read", threads)}


async def measure_host(report: Report, name: str, size: int, rounds: int, quick: bool) -> None:
    memory = Memory(size, (256 * MIB if quick else GIB) // size)
    tier = HostTier(memory)
    for threads in THREADS:

        async def ours(threads: int = threads) -> Figures:
            return tier.round(threads)

        async def limit(threads: int = threads) -> Figures:
            return memory.copy(threads)

        figures = await interleave({"ours": ours, "memcpy": limit}, rounds)
        for what in ("put", "get"):
            cpu = figures["ours"][f"{what} cpu"]
            cell = Cell(
                f"host {what}, {name}, {threads} threads",
                "GB/s",
                "higher",
                figures["ours"][what],
                limit=figures["memcpy"]["speed"],
                goal=HOST_GOAL,
                note=f"limit: memcpy; {cpu:.2f} CPU s/GB",
            )
            report.add(cell)
    tier.store.close()


async def measure_disk(report: Report, name: str, size: int, rounds: int, quick: bool, folder: Path) -> None:
    memory = Memory(size, (256 * MIB if quick else GIB) // size)
    raw, tier = RawDisk(memory, folder), DiskTier(memory, folder)
    by = "fio" if shutil.which("fio") else "direct I/O on threads"
    for threads in THREADS:

        async def ours(threads: int = threads) -> Figures:
            return tier.round(threads)

        async def limit(threads: int = threads) -> Figures:
            return raw.round(threads)

        figures = await interleave({"ours": ours, "disk": limit}, rounds)
        for what in ("put", "get"):
            depth = WRITE_DEPTH if what == "put" else threads
            cell = Cell(
                f"nvme {what}, {name}, {threads} threads",
                "GB/s",
                "higher",
                figures["ours"][what],
                limit=figures["disk"][what],
                goal=DISK_GOAL,
                note=f"limit: {by}, depth {depth}; {figures['ours'][f'{what} cpu']:.2f} CPU s/GB",
            )
            report.add(cell)
    raw.path.unlink()


async def run(report: Report, quick: bool) -> None:
    rounds = 2 if quick else 5
    sizes = SIZES.items()
    for name, size in sizes:
        await measure_host(report, name, size, rounds, quick)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for name, size in sizes:
            await measure_disk(report, name, size, 1 if quick else 3, quick, Path(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--dir", type=Path)
    arguments, rest = parser.parse_known_args()
    place = arguments.dir
    sys.argv[1:] = rest
    main(__file__, run)
