"""Speed of the host, nvme and network tier, checksums on, beside memory, disk, link and peers' stores.

    python benchmarks/tiers.py [--json] [--quick] [--dir FOLDER] [--tier TIER]

Blocks of 64 KiB, 512 KiB and 2 MiB, put and got in scattered order by 1 and 2 threads, from and to the
caller's memory. Limits: memcpy of the same bytes in the same pattern; `fio` with the same block size and
depth where it is installed (`apt-get install fio`; the notes say which it was), else positioned direct I/O on
as many threads; one NIXL READ of the same blocks, in memory that processes share, as arenas are (of private
memory, which Linux gives huge pages more readily, in the note).
FOLDER is where the disk tier lies (default: the temporary directory). TIER: only host, nvme or network.

A look-up is timed as an engine's scheduler waits for it: 512 pages that another process's store has.

Peers do the same work in processes and environments of their own. They check nothing, but for cells that say
so. Mooncake gets 32 blocks a call, which is its fastest way.

Host and nvme are `TieredStore`'s. The host tier is full all the time, so every put evicts, by LRU: other
policies would refuse some of the blocks. Disk puts count until all is on the disk (`flush`); a writer's batch
has depth 32. Disk gets are of blocks that are not in memory; each caller has one under way.

The network tier is two kvbm processes on this machine, connected as UCX does by itself, and by TCP. A chain
is prefetched from one to the other, or two at once (2 threads): until all of it is there, checked (beside
NIXL), and until an engine has copied it to its pages, checked again (beside peers, whose gets end in the
caller's memory).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from tier import lookups, peers, raw_disk
from tier.embedded import DiskTier, HostTier
from tier.memory import KIB, MIB, Figures, Memcpy, Memory
from tier.network import two_stores

from harness import Cell, Report, interleave, main, say
from raw_nixl import RawNixl

SIZES = {"64 KiB": 64 * KIB, "512 KiB": 512 * KIB, "2 MiB": 2 * MIB}
THREADS = (1, 2)
HOST_GOAL, DISK_GOAL, NETWORK_GOAL = 0.80, 0.90, 0.85
# Of a look-up, in microseconds.
LOOKUP_GOAL = 100.0
# Of the better peer's speed.
HOST_PEER_GOALS = {"64 KiB": 2.0, "512 KiB": 1.3, "2 MiB": 1.0}
DISK_PEER_GOAL, NETWORK_PEER_GOAL, CHECKED_PEER_GOAL = 1.3, 2.0, 10.0
# What UCX is told of transports; "all" is what it uses when it is told nothing.
LINKS = {"UCX's choice": "all", "TCP": "tcp,self"}


class Store(Protocol):
    def round(self, threads: int) -> Figures:
        """GB/s of `put` and `get`, and CPU seconds a GB where they are known."""
        ...


async def medians(stores: Mapping[str, Store], threads: int, rounds: int) -> dict[str, Figures]:
    def way(store: Store):
        async def once() -> Figures:
            return store.round(threads)

        return once

    return await interleave({name: way(store) for name, store in stores.items()}, rounds)


def cpu(figures: Figures, what: str) -> str:
    return f"{figures[f'{what} cpu']:.2f} CPU s/GB"


def add_limit(
    report: Report, name: str, what: str, figures: dict[str, Figures], goal: float, by: str
) -> None:
    """Ours against what the machine can do."""
    ours, limit = figures["ours"], figures["limit"][what]
    spent = f", {cpu(figures['limit'], what)}" if f"{what} cpu" in figures["limit"] else ""
    note = f"limit: {by}{spent}; ours {cpu(ours, what)}"
    report.add(Cell(name, "GB/s", "higher", ours[what], limit=limit, goal=goal, note=note))


def add_peers(report: Report, name: str, what: str, figures: dict[str, Figures], goal: float) -> None:
    """Ours against the peers that check nothing, and against those that do."""
    ours = figures["ours"]
    names = [name for name in figures if name not in ("ours", "limit")]
    checked = [peer for peer in names if peer.endswith(peers.CHECKED)]
    for some, wanted in ((set(names) - set(checked), goal), (set(checked), CHECKED_PEER_GOAL)):
        if beside := {peer: figures[peer][what] for peer in names if peer in some}:
            title = f"{name}, beside {'peers' if some.isdisjoint(checked) else 'a peer that checks'}"
            spent = ", ".join(f"{peer} {cpu(figures[peer], what)}" for peer in beside)
            note = f"ours {cpu(ours, what)}, {spent}"
            report.add(Cell(title, "GB/s", "higher", ours[what], beside, goal=wanted, note=note))


async def measure_host(report: Report, name: str, size: int, rounds: int, total: int, folder: Path) -> None:
    memory = Memory(size, total // size)
    with ExitStack() as cleanup:
        tier = HostTier(memory)
        cleanup.callback(tier.store.close)
        others = peers.of_memory(cleanup, size, memory.items, folder)
        for threads in THREADS:
            stores = {"ours": tier, "limit": Memcpy(memory), **others}
            figures = await medians(stores, threads, rounds)
            for what in ("put", "get"):
                cell = f"host {what}, {name}, {threads} threads"
                add_limit(report, cell, what, figures, HOST_GOAL, "memcpy")
                add_peers(report, cell, what, figures, HOST_PEER_GOALS[name])


async def measure_lookups(report: Report, quick: bool, folder: Path) -> None:
    taken, slow = await lookups.microseconds(folder, 500 if quick else 5000)
    name = f"host look-up of {lookups.PAGES} pages"
    note = f"from page hashes to the answer of another process; 99th percentile {slow:.3g} us"
    report.add(Cell(name, "us", "lower", taken, goal=LOOKUP_GOAL, note=note))


async def measure_disk(report: Report, name: str, size: int, rounds: int, total: int, folder: Path) -> None:
    if not raw_disk.HAS_FIO:
        say(f"the limit is {raw_disk.NAME}")
    memory = Memory(size, total // size)
    raw, tier = raw_disk.RawDisk(memory, folder), DiskTier(memory, folder)
    with ExitStack() as cleanup:
        cleanup.callback(raw.path.unlink)
        others = peers.of_disk(cleanup, size, memory.items, folder)
        for threads in THREADS:
            figures = await medians({"ours": tier, "limit": raw, **others}, threads, rounds)
            for what in ("put", "get"):
                depth = raw_disk.WRITE_DEPTH if what == "put" else threads
                cell = f"nvme {what}, {name}, {threads} threads"
                add_limit(report, cell, what, figures, DISK_GOAL, f"{raw_disk.NAME}, depth {depth}")
                add_peers(report, cell, what, figures, DISK_PEER_GOAL)


async def measure_network(
    report: Report, name: str, size: int, rounds: int, total: int, folder: Path
) -> None:
    memory = Memory(size, total // size)
    for link, transports in LINKS.items():
        with ucx(transports), ExitStack() as cleanup:
            raw = cleanup.enter_context(RawNixl(total, memory.items, "READ", shared=True))
            private = cleanup.enter_context(RawNixl(total, memory.items, "READ"))
            others = peers.of_network(cleanup, size, memory.items, folder) if link == "TCP" else {}
            async with two_stores(memory, folder) as pair:

                def moved(raw: RawNixl):
                    async def once() -> Figures:
                        return {"get": memory.gigabytes / raw.move()}

                    return once

                def of(store: Store, threads: int):
                    async def once() -> Figures:
                        return store.round(threads)

                    return once

                for threads in THREADS:
                    ways = {peer: of(store, threads) for peer, store in others.items()}
                    ways |= {
                        "ours": partial(pair.round, threads),
                        "limit": moved(raw),
                        "private": moved(private),
                    }
                    figures = await interleave(ways, rounds)
                    cell = f"network get, {name}, {link}, {threads} threads"
                    by = f"NIXL READ of shared memory ({figures.pop('private')['get']:.3g} of private)"
                    add_limit(report, cell, "get", figures, NETWORK_GOAL, by)
                    figures["ours"]["get"] = figures["ours"]["engine"]
                    add_peers(report, f"{cell}, to pages", "get", figures, NETWORK_PEER_GOAL)


@contextmanager
def ucx(transports: str) -> Iterator[None]:
    """NIXL agents made meanwhile, in processes started meanwhile, use these."""
    before = os.environ.get("UCX_TLS")
    os.environ["UCX_TLS"] = transports
    try:
        yield
    finally:
        os.environ.pop("UCX_TLS")
        if before is not None:
            os.environ["UCX_TLS"] = before


MEASURES = {"host": measure_host, "nvme": measure_disk, "network": measure_network}


async def run(report: Report, quick: bool) -> None:
    total = (256 if quick else 512) * MIB
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for tier, measure in MEASURES.items():
            if only not in (None, tier):
                continue
            for name, size in SIZES.items():
                await measure(report, name, size, 2 if quick else 5, total, Path(folder))
        if only in (None, "host"):
            await measure_lookups(report, quick, Path(folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--tier", choices=MEASURES)
    arguments, rest = parser.parse_known_args()
    place, only = arguments.dir, arguments.tier
    sys.argv[1:] = rest
    main(__file__, run)
