"""The prefix index beside two published Rust indexes, on one stream; its Python binding; the block hash.

The stream comes from Mooncake's conversation trace (`index/src/stream.rs`) at 8, 64 and 512 workers.
`index/` is a crate of its own with the peers as dependencies; it is built with the first run. Updates
count the CPU time of their thread; every look-up is timed alone, with one reading of its whole answer; the
answers of all indexes must agree.
Left out where the traces are absent (KVMESH_TRACES, else `../shared/traces`).
Goals against the better peer: block operations/s >= 2x, look-ups p50 and p99 <= 0.5x, no cell worse; at
64 workers <= 24 bytes a held block. Python: a match of 64 blocks <= 3 us, hash_tokens >= 80 % of
OpenSSL's SHA-256 over the same bytes (pages of 16 tokens cannot: padding leaves 75 %), 8,192 tokens <= 60 us.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable

import numpy as np

from harness import CONVERSATIONS, ROOT, Cell, Report, main, say
from kvmesh.core import PrefixIndex, hash_tokens

CRATE = ROOT / "benchmarks" / "index"
TARGET = ROOT / ".cache" / "index-bench"
# Workers, blocks of each, copies of the trace.
SETTINGS = ((8, 16_384, 1), (64, 8_192, 4), (512, 2_048, 4))
# The same index by a look-up of another kind: no peer of its own where nothing is looked up.
LEAN = "kv-index 2.0.0 score_into"


def against_peers(report: Report, rounds: int) -> None:
    say("building the peers (some minutes the first time)")
    build = ["cargo", "build", "--release", "--quiet", "--locked", "--manifest-path", CRATE / "Cargo.toml"]
    subprocess.run([*build, "--target-dir", TARGET], check=True)
    for setting in SETTINGS:
        say(f"{setting[0]} workers x {setting[1]} blocks, trace x {setting[2]}")
        command = [TARGET / "release" / "index-bench", CONVERSATIONS, *map(str, setting), str(rounds)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peers: dict[str, dict[str, float]] = json.loads(output)
        ours = peers.pop("ours")
        at = f"{setting[0]} workers"

        def cell(
            name: str,
            unit: str,
            figure: str,
            goal: float,
            *,
            higher: bool = False,
            at: str = at,
            ours: dict[str, float] = ours,
            peers: dict[str, dict[str, float]] = peers,
        ) -> None:
            beside = {
                peer: figures[figure] for peer, figures in peers.items() if peer != LEAN or unit == "us"
            }
            better = "higher" if higher else "lower"
            report.add(Cell(f"{name}, {at}", unit, better, ours[figure], beside, goal=goal))

        cell("block operations", "1/s", "ops_per_s", 2, higher=True)
        cell("look-up p50", "us", "p50_us", 0.5)
        cell("look-up p99", "us", "p99_us", 0.5)
        cell("memory a held block", "B", "bytes_per_block", 1)
        cell("block operations beside a reader", "1/s", "shared_ops_per_s", 1, higher=True)
        cell("look-up p50 beside a writer", "us", "shared_p50_us", 1)
        cell("look-up p99 beside a writer", "us", "shared_p99_us", 1)
        if setting[0] == 64:
            figure = ours["bytes_per_block"]
            report.add(Cell("memory a held block, 64 workers, absolute", "B", "lower", figure, goal=24))


def microseconds(call: Callable[[], object], calls: int) -> float:
    """The median over batches of a call's time."""
    times: list[float] = []
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def event_batch(holder: str, op: int, events: list[np.ndarray]) -> bytes:
    """A serialized KvEventBatch of equal operations."""
    columns = {
        1: holder.encode(),
        7: bytes([op]) * len(events),
        8: b"".join(varint(len(hashes)) for hashes in events),
        9: np.concatenate(events).astype("<u8").tobytes(),
    }
    return b"".join(varint(n << 3 | 2) + varint(len(column)) + column for n, column in columns.items())


def from_python(report: Report) -> None:
    prompt = np.random.default_rng(7).integers(1 << 63, size=64, dtype=np.uint64)
    # Look-ups take turns, so that no answer is the last one once more.
    prompts = itertools.cycle([prompt, np.append(prompt[:63], np.uint64(1))])
    for workers in (8, 64):
        index = PrefixIndex()
        for n in range(workers):
            index.store(index.add_engine(f"engine-{n}"), prompt)
        figure = microseconds(lambda index=index: index.match(next(prompts)), 2_000)
        name = f"match of 64 blocks from Python, {workers} found"
        report.add(Cell(name, "us", "lower", figure, goal=3))
        rows = np.empty(workers, np.uint32), np.empty((workers, 4), np.uint32)
        figure = microseconds(lambda index=index, rows=rows: index.match_into(next(prompts), *rows), 2_000)
        name = f"match_into of 64 blocks from Python, {workers} found"
        report.add(Cell(name, "us", "lower", figure, goal=3))
    index = PrefixIndex()
    index.add_engine("engine")
    blocks = np.random.default_rng(8).integers(1 << 63, size=(64, 64), dtype=np.uint64)
    stored, removed = (event_batch("engine", 4 + kind, list(blocks)) for kind in (0, 2))

    def apply() -> None:
        index.apply(stored)
        index.apply(removed)

    figure = 2 * blocks.size / microseconds(apply, 20) * 1e6
    report.add(Cell("apply, batches of 64 x 64 blocks", "1/s", "higher", figure, goal=2e6))


def hashing(report: Report) -> None:
    tokens = np.random.default_rng(9).integers(150_000, size=8_192, dtype=np.uint32)
    for page in (16, 32, 64):
        message = 32 + 4 * page
        pages = len(tokens) // page
        bare: list[float] = []
        ours: list[float] = []
        for _ in range(5):
            ours.append(microseconds(lambda page=page: hash_tokens(tokens, page), 50))
            bare.append(sha256_us(message * pages))
        figure, limit = statistics.median(ours), statistics.median(bare)
        # Every message is padded by 9 bytes to whole blocks of 64, which the bare hash is spared.
        ceiling = message / (64 * -(-(message + 9) // 64))
        note = (
            f"{limit / figure:.0%} of the bare speed; each page a message of its own, at most {ceiling:.0%}"
        )
        name = f"hash_tokens of 8,192 tokens, pages of {page}"
        report.add(Cell(name, "us", "lower", figure, limit=limit, goal=1 / 0.8, note=note))
        report.add(Cell(f"{name}, absolute", "us", "lower", figure, goal=60))


def sha256_us(count: int) -> float:
    """OpenSSL's time for so many bytes in one message."""
    data = bytes(count)
    return microseconds(lambda: hashlib.sha256(data).digest(), 50)


async def run(report: Report, quick: bool) -> None:
    if CONVERSATIONS.exists():
        against_peers(report, 3 if quick else 5)
    else:
        say(f"no {CONVERSATIONS}: the comparison with the peers is left out; set KVMESH_TRACES")
    from_python(report)
    hashing(report)


if __name__ == "__main__":
    main(__file__, run)
