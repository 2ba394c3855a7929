"""What every benchmark shares: cells, interleaved medians, CPU accounting, a table or one JSON object.

A benchmark is one file with a `run(report, quick)` function and `harness.main(__file__, run)` at its end:

    python benchmarks/spine.py [--json] [--quick]

JSON: {"benchmark", "machine", "versions", "cells": [{"name", "unit", "better": "higher"|"lower", "ours",
"peers": {"NAME VERSION": value}, "limit", "goal", "note"}]}. `goal` is the wanted ratio of ours to the
best peer, else to the limit, else an absolute value; absent values are null.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
# Public traces, which are not part of the repository; what needs them is left out where they are absent.
TRACES = Path(os.environ.get("KVMESH_TRACES", ROOT.parent / "shared" / "traces"))
CONVERSATIONS = TRACES / "mooncake" / "conversation_trace.jsonl"
sys.path.insert(0, str(ROOT / "tests"))

from fixtures.mesh import Mesh  # noqa: E402

COLUMNS = ("cell", "unit", "ours", "peer or limit", "ratio", "goal", "met", "note")
progress = Console(stderr=True)


@dataclass
class Cell:
    """One measured figure."""

    name: str
    unit: str
    better: Literal["higher", "lower"]
    ours: float
    peers: dict[str, float] = field(default_factory=dict)
    # The best that this machine can do: memcpy, a bare engine, the disk.
    limit: float | None = None
    goal: float | None = None
    note: str = ""

    def against(self) -> float | None:
        """What `goal` is a ratio to; None when the goal is absolute."""
        if self.peers:
            return max(self.peers.values()) if self.better == "higher" else min(self.peers.values())
        return self.limit

    def met(self) -> bool | None:
        """Whether the goal was reached; None without a goal."""
        if self.goal is None:
            return None
        base = self.against()
        wanted = self.goal if base is None else self.goal * base
        return self.ours >= wanted if self.better == "higher" else self.ours <= wanted

    def row(self) -> list[str]:
        """The cell as texts under `COLUMNS`."""
        base = self.against()
        beside = [f"{value:.4g} {name}" for name, value in self.peers.items()]
        beside += [f"{self.limit:.4g} limit"] if self.limit is not None else []
        goal = ""
        if self.goal is not None:
            goal = f"{'>=' if self.better == 'higher' else '<='} {self.goal:g}{'' if base is None else 'x'}"
        return [
            self.name,
            self.unit,
            f"{self.ours:.4g}",
            ", ".join(beside),
            f"{self.ours / base:.2f}" if base else "",
            goal,
            {True: "yes", False: "no", None: ""}[self.met()],
            self.note,
        ]


@dataclass
class Report:
    benchmark: str
    machine: str
    versions: dict[str, str]
    cells: list[Cell] = field(default_factory=list)

    def add(self, cell: Cell) -> None:
        self.cells.append(cell)
        say(f"{cell.name}: {cell.ours:.4g} {cell.unit}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def table(self) -> Table:
        table = Table(title=f"{self.benchmark}  ({self.machine})", title_justify="left")
        for column in COLUMNS:
            table.add_column(column, justify="right" if column in ("ours", "ratio", "goal") else "left")
        for cell in self.cells:
            table.add_row(*cell.row())
        return table


def say(text: str) -> None:
    """Progress, to standard error."""
    progress.print(f"[dim]{text}[/dim]", highlight=False)


def main(file: str, run: Callable[[Report, bool], Coroutine[Any, Any, None]]) -> None:
    """Parse the common flags, run, print."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a look, not a measurement")
    arguments = parser.parse_args()
    report = Report(Path(file).stem, machine(), versions("sglang", "torch", "nixl", "grpcio"))
    # A run that is told to end takes its meshes with it, as one that is interrupted does.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    # What libraries print of themselves must not end up in the result.
    with os.fdopen(os.dup(1), "w") as result:
        os.dup2(2, 1)
        asyncio.run(run(report, arguments.quick))
        if arguments.json:
            print(report.to_json(), file=result)
        else:
            Console(file=result).print(report.table())


def machine() -> str:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = psutil.virtual_memory().total / (1 << 30)
    return f"{psutil.cpu_count()} x {model}, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def versions(*packages: str) -> dict[str, str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"kvmesh": commit or "unknown"} | {name: importlib.metadata.version(name) for name in packages}


async def interleave(
    variants: Mapping[str, Callable[[], Awaitable[dict[str, float]]]], rounds: int
) -> dict[str, dict[str, float]]:
    """Run the variants in turn, `rounds` times after one warm-up; the median of each figure of each variant.

    Taking turns lets a machine that drifts drift for all of them.
    """
    results: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            figures = await variant()
            if number:
                results[name].append(figures)
                say(
                    f"round {number}/{rounds} {name}: "
                    + ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
                )
    return {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in results.items()
    }


@contextmanager
def mesh(home: Path, config: dict[str, Any]) -> Iterator[Mesh]:
    """A mesh of real processes for the length of the block."""
    say(f"starting a mesh: {config.get('workers', 'prefill + decode')}")
    served = Mesh(home, config)
    try:
        yield served.up()
    finally:
        served.down()


def cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time all threads of the live processes have used so far, to the nanosecond.

    By each process's own CPU clock (clock_getcpuclockid(3)); /proc counts in hundredths of a second.
    """
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)
