"""Eviction policies on request traces: token hit rate beside the offline optimum, and block touches a second.

    python benchmarks/eviction.py [--trace FILE_OR_FOLDER] [--json] [--quick]

A cache of some number of blocks gets every request's prompt; a hit is the longest cached prefix, and the
second half of the requests is counted. FILE is JSON lines as Mooncake's: `timestamp` (milliseconds; without
it, requests are a second apart), `input_length` (tokens), `hash_ids` (one a block of 512 tokens); gzip may
have packed them. Of a folder, all such files are used; default: $KVMESH_TRACES, else `../shared/traces`.
Made-up traces (scans, rounds, Zipf, phases) need no file.

Goals, on Mooncake's conversation trace: the hit rates a class index with known return laws comes to; with a
hint "will return" that is right 80 % of the time .23 at 5,000 blocks; on every trace and size at most .003
below the better of LRU and GDSF; a million touches a second on one core.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import statistics
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, TextIO

from harness import CONVERSATIONS, ROOT, TRACES, Cell, Report, main, say

SIZES = (1_000, 5_000, 10_000, 30_000, 50_000)
GOALS = (0.090, 0.190, 0.255, 0.354, 0.378)
POLICIES = ("default", "class-index", "lru", "gdsf", "s3-fifo", "optimum")
MADE_UP = ("scan", "loop", "two loops", "sawtooth", "zipf", "drift", "retired", "phases", "chat", "agents")
MADE_UP_SIZES = (250, 500, 1_000, 1_500, 4_000)
HINT_GOAL, HINT_SIZE, HINT_ACCURACY = 0.23, 5_000, 80
GUARD = 0.003
SPEED = 1e6

Results = dict[str, dict[int, tuple[float, float]]]


class BadTrace(ValueError):
    """A trace that cannot be used; says which line and why."""


def find_traces(path: Path) -> list[Path]:
    """The files at or below `path` that name the blocks of each request."""
    files = [path] if path.is_file() else sorted([*path.rglob("*.jsonl"), *path.rglob("*.jsonl.gz")])
    return [file for file in files if names_blocks(file)]


def open_text(file: Path) -> TextIO:
    """The file's text, also of one that gzip has made."""
    with file.open("rb") as source:
        packed = source.read(2) == b"\x1f\x8b"
    return gzip.open(file, "rt", encoding="utf-8") if packed else file.open(encoding="utf-8")


def names_blocks(file: Path) -> bool:
    with open_text(file) as lines:
        try:
            return any('"hash_ids"' in line for line in itertools.islice(lines, 1))
        except UnicodeDecodeError:
            return False


def as_text(file: Path) -> str:
    """The trace as the simulator reads it, in order of arrival.

    A line is a request: seconds, tokens, and its blocks. Ids may be whatever JSON has: equal ones get one
    number. Raises BadTrace.
    """
    numbers: dict[Any, int] = {}
    requests: list[tuple[float, int, str]] = []
    with open_text(file) as source:
        for number, line in enumerate(source):
            if not line.strip():
                continue
            try:
                request = json.loads(line)
                seconds = float(request.get("timestamp", 1e3 * number)) / 1e3
                tokens = int(request["input_length"])
                blocks = [numbers.setdefault(block, len(numbers)) for block in request["hash_ids"]]
            except KeyError as missing:
                raise BadTrace(f"{file}, line {number + 1}: no {missing}") from missing
            except (ValueError, TypeError, AttributeError) as wrong:
                raise BadTrace(f"{file}, line {number + 1}: {wrong}") from wrong
            if not (math.isfinite(seconds) and 0 <= tokens < 1 << 48):
                raise BadTrace(f"{file}, line {number + 1}: {seconds} s, {tokens} tokens")
            requests.append((seconds, tokens, " ".join(map(str, blocks))))
    requests.sort(key=lambda request: request[0])
    return "\n".join(f"{seconds} {tokens} {blocks}" for seconds, tokens, blocks in requests)


def simulator() -> Path:
    say("building the simulator")
    manifest = ROOT / "rust" / "Cargo.toml"
    command = ["cargo", "build", "--quiet", "--release", "--example", "eviction", "-p", "kvmesh-eviction"]
    subprocess.run([*command, "--manifest-path", str(manifest)], check=True)
    return manifest.parent / "target" / "release" / "examples" / "eviction"


def simulate(
    program: Path,
    trace: str,
    sizes: tuple[int, ...],
    policies: tuple[str, ...],
    text: str = "",
    accuracy: int | None = None,
) -> Results:
    """Policy -> blocks -> (token hit rate, touches a second)."""
    command = [str(program), trace, ",".join(map(str, sizes)), ",".join(policies)]
    command += [] if accuracy is None else [str(accuracy)]
    output = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, check=True).stdout
    results: Results = {policy: {} for policy in policies}
    for line in output.splitlines():
        policy, size, rate, speed = line.split()
        results[policy][int(size)] = (float(rate), float(speed))
    return results


def add_rates(report: Report, name: str, results: Results, goals: dict[int, float]) -> None:
    for size, (ours, _) in results["default"].items():
        others = ", ".join(f"{policy} {results[policy][size][0]:.3f}" for policy in POLICIES[1:-1])
        title = f"hit rate, {name}, {size} blocks"
        best = results["optimum"][size][0]
        cell = Cell(title, "of tokens", "higher", ours, limit=best, note=f"limit: optimum; {others}")
        if size in goals:
            cell.goal = round(goals[size] / best, 4)
            cell.note = f"goal {goals[size]:.3f}; {cell.note}"
        report.add(cell)


def add_guard(report: Report, name: str, results: Results) -> None:
    """How far ours stays below the better of LRU and GDSF where it is worst."""
    below, size = max(
        (max(results[other][size][0] for other in ("lru", "gdsf")) - ours, size)
        for size, (ours, _) in results["default"].items()
    )
    title, note = f"below the better of LRU and GDSF, {name}", f"worst at {size} blocks"
    report.add(Cell(title, "of tokens", "lower", round(below, 4), goal=GUARD, note=note))


def speed(program: Path, trace: str, sizes: tuple[int, ...], rounds: int, text: str = "") -> float:
    """Touches a second of the default at its slowest size; medians of rounds over all sizes."""
    runs = [simulate(program, trace, sizes, ("default",), text)["default"] for _ in range(rounds)]
    return min(statistics.median(run[size][1] for run in runs) for size in sizes)


async def run(report: Report, quick: bool) -> None:
    program = simulator()
    rounds = 1 if quick else 5
    slowest: dict[str, float] = {}
    for file, text in traces.items():
        say(f"{file.name}")
        sizes = SIZES[::2] if quick else SIZES
        known = file.stem == CONVERSATIONS.stem
        results = simulate(program, "-", sizes, POLICIES, text)
        add_rates(report, file.stem, results, dict(zip(SIZES, GOALS, strict=True)) if known else {})
        add_guard(report, file.stem, results)
        if known:
            hinted = simulate(program, "-", (HINT_SIZE,), ("default",), text, HINT_ACCURACY)
            rate, _ = hinted["default"][HINT_SIZE]
            name = f"hit rate, {file.stem}, {HINT_SIZE} blocks, hint {HINT_ACCURACY} % right"
            report.add(Cell(name, "of tokens", "higher", rate, goal=HINT_GOAL))
        slowest[file.stem] = speed(program, "-", sizes, rounds, text)
    for name in MADE_UP:
        results = simulate(program, name, MADE_UP_SIZES, POLICIES)
        add_guard(report, name, results)
        slowest[name] = speed(program, name, MADE_UP_SIZES, rounds)
    name = min(slowest, key=lambda trace: slowest[trace])
    note = f"of CPU time; worst trace and size: {name}"
    report.add(Cell("block touches", "a second", "higher", slowest[name], goal=SPEED, note=note))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--trace", type=Path)
    arguments, rest = parser.parse_known_args()
    place = arguments.trace or TRACES
    if arguments.trace and not place.exists():
        sys.exit(f"{place} is not there")
    try:
        traces = {file: as_text(file) for file in find_traces(place)} if place.exists() else {}
    except (OSError, EOFError, zlib.error, BadTrace) as error:
        sys.exit(f"error: {error}")
    if not traces and arguments.trace:
        sys.exit(
            f"no file at {place} has `hash_ids` in its first line: pass --trace FILE with "
            "`input_length` and `hash_ids`, as Mooncake's and aiperf's have them; Azure's name no blocks"
        )
    if not traces:
        say(f"no traces at {place}: made-up ones only; set KVMESH_TRACES, or pass --trace FILE")
    sys.argv[1:] = rest
    main(__file__, run)
