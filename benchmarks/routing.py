"""TTFT, ITL, E2E and reuse under kvmesh's router and NVIDIA Dynamo's, and the time of a decision.

One simulator (`rust/crates/kvmesh-sim`; engines take the time that Dynamo's mocker gives them), one trace,
the same events for all: round-robin; Dynamo's published selection code (`dynamo-kv-router` 1.6.1, in a crate
of the benchmark's own) with its default and with prefill load weighed 10 and 100 times; kvmesh's `kv`.
Medians over seeds. The Mooncake trace's raw arrivals come in bursts, one tick every 3 s; `spread` spreads
them over their tick.

    python benchmarks/routing.py [--json] [--quick] [--trace FILE --workers N --blocks N --rate X]

Goals: the reductions of TTFT in `SCENARIOS` against Dynamo's default; never behind its best setting in TTFT,
ITL or E2E mean; reuse >= .32 at raw x2; ahead of its default also where kvmesh misreads every worker's rates
by 10 or 30 %. A decision in process takes <= 10 us at 64 workers and <= 30 us at 512.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from harness import CONVERSATIONS, ROOT, Cell, Report, machine, say, versions

PEER = "dynamo-kv-router 1.6.1"
SETTINGS = {"dynamo": PEER, "dynamo-10": f"{PEER} x10", "dynamo-100": f"{PEER} x100"}
TICK_MS = 3000
RATE_ERRORS = (0.1, 0.3)
DECISION_GOALS_US = {64: 10.0, 512: 30.0}


@dataclass(frozen=True)
class Scenario:
    """One cluster and traffic; goals are ratios to Dynamo's default, of TTFT mean and p95."""

    name: str
    rate: float
    spread_ms: int = 0
    split: tuple[int, int] | None = None
    goals: tuple[float, float] | None = None
    reuse_goal: float | None = None


SCENARIOS = (
    Scenario("raw x1", 1, goals=(0.80, 0.95)),
    Scenario("raw x2", 2, goals=(0.70, 0.90), reuse_goal=0.32),
    Scenario("raw x4", 4, goals=(0.60, 0.78)),
    Scenario("spread x1", 1, TICK_MS),
    Scenario("spread x2", 2, TICK_MS),
    Scenario("spread x4", 4, TICK_MS, goals=(0.80, 0.90)),
    Scenario("6P2D raw x2", 2, split=(6, 2)),
)


def build() -> tuple[Path, Path]:
    """The simulator with the peer in it, and the timing of decisions; both built if need be."""
    target = ROOT / "rust" / "target"
    peer = ROOT / "benchmarks" / "routing_peer" / "Cargo.toml"
    cargo = ["cargo", "build", "--release", "--quiet", "--locked"]
    say("building the simulator with the peer's router")
    subprocess.run([*cargo, "--manifest-path", peer, "--target-dir", target / "peer"], check=True)
    decision = ["-p", "kvmesh-select", "--example", "decision"]
    subprocess.run([*cargo, "--manifest-path", ROOT / "rust" / "Cargo.toml", *decision], check=True)
    return target / "peer" / "release" / "routing-peer", target / "release" / "examples" / "decision"


class SimulationFailed(Exception):
    """The simulator's own words, such as what is wrong with a trace."""


class Simulator:
    """Runs the simulator; each answer holds the figures of every router and seed."""

    def __init__(self, binary: Path, trace: Path, workers: int, blocks: int, seeds: int) -> None:
        self._binary = binary
        self.trace = trace
        self._workers = workers
        self._blocks = blocks
        self._seeds = seeds

    def run(self, scenario: Scenario, routers: Sequence[str], rate_error: float = 0.0) -> dict[str, Figures]:
        command = [self._binary, "--json", "--trace", self.trace, "--router", ",".join(routers)]
        command += ["--blocks", self._blocks, "--rate", scenario.rate, "--spread-ms", scenario.spread_ms]
        command += ["--seeds", self._seeds, "--rate-error", rate_error]
        if scenario.split:
            command += ["--prefill", scenario.split[0], "--decode", scenario.split[1]]
        else:
            command += ["--workers", self._workers]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            raise SimulationFailed(done.stderr.strip() or f"the simulator ended with {done.returncode}")
        return {name: Figures(runs) for name, runs in json.loads(done.stdout)["routers"].items()}


class Figures:
    """The runs of one router; every figure is the median over the seeds."""

    def __init__(self, runs: list[dict[str, Any]]) -> None:
        self._runs = runs

    def median(self, of: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(of(run) for run in self._runs)

    def ms(self, key: str, part: str = "mean") -> float:
        return self.median(lambda run: run[key][part])

    def reuse(self) -> float:
        return self.median(lambda run: run["reuse"])


def measure(report: Report, simulator: Simulator, scenario: Scenario) -> None:
    figures = simulator.run(scenario, ["round-robin", *SETTINGS, "kv"])
    ours, default, blind = figures["kv"], figures["dynamo"], figures["round-robin"]
    goals = scenario.goals or (None, None)
    for part, goal in zip(("mean", "p95"), goals, strict=True):
        value = ours.ms("ttft_ms", part)
        peers = {PEER: default.ms("ttft_ms", part)}
        note = f"round-robin {blind.ms('ttft_ms', part):.0f}"
        name = f"{scenario.name}: TTFT {part}"
        report.add(Cell(name, "ms", "lower", value, peers, goal=goal, note=note))
    for key, word in (("ttft_ms", "TTFT"), ("itl_ms", "ITL"), ("e2e_ms", "E2E")):
        peers = {label: figures[name].ms(key) for name, label in SETTINGS.items()}
        name = f"{scenario.name}: {word} mean against the best setting"
        note = f"round-robin {blind.ms(key):.4g}"
        report.add(Cell(name, "ms", "lower", ours.ms(key), peers, goal=1.0, note=note))
    shares = {label: figures[name].reuse() for name, label in SETTINGS.items()}
    note = "share of prompt tokens found cached; " + ", ".join(f"{v:.3f} {k}" for k, v in shares.items())
    name = f"{scenario.name}: reuse"
    report.add(Cell(name, "share", "higher", ours.reuse(), goal=scenario.reuse_goal, note=note))
    for error in RATE_ERRORS:
        misread = simulator.run(scenario, ["kv"], error)["kv"]
        name = f"{scenario.name}: TTFT mean, rates misread by {error:.0%}"
        peers = {PEER: default.ms("ttft_ms")}
        report.add(Cell(name, "ms", "lower", misread.ms("ttft_ms"), peers, goal=1.0))


def measure_decisions(report: Report, binary: Path) -> None:
    lines = subprocess.run([binary], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    for timing in map(json.loads, lines):
        workers = timing["workers"]
        note = f"p99 {timing['decision_p99_us']:.1f}; with report and end {timing['cycle_p50_us']:.1f}"
        goal = DECISION_GOALS_US.get(workers)
        value = timing["decision_p50_us"]
        report.add(Cell(f"decision, {workers} workers", "us", "lower", value, goal=goal, note=note))


@contextmanager
def unpacked(trace: Path) -> Iterator[Path]:
    """The trace, or what gzip has packed in it, under its name, for as long as it is used."""
    if trace.suffix != ".gz" or not trace.exists():
        yield trace
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / trace.stem
        try:
            with gzip.open(trace) as packed, plain.open("wb") as file:
                shutil.copyfileobj(packed, file)
        except (OSError, EOFError, zlib.error) as error:
            raise SimulationFailed(f"{trace}: {error}") from error
        yield plain


def compare(report: Report, arguments: argparse.Namespace, simulator: Simulator, seeds: int) -> None:
    scenarios = SCENARIOS
    if arguments.trace or arguments.rate:
        rate = arguments.rate or 1.0
        scenarios = (
            Scenario(f"raw x{rate:g}", rate),
            Scenario(f"spread x{rate:g}", rate, TICK_MS),
        )
    if not simulator.trace.exists():
        say(
            f"no {simulator.trace}: the routers are not compared; set KVMESH_TRACES, or name one with --trace"
        )
        scenarios = ()
    for scenario in scenarios:
        say(f"{scenario.name}, {seeds} seed{'s' if seeds > 1 else ''}")
        measure(report, simulator, scenario)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="one seed: a look, not a measurement")
    parser.add_argument(
        "--trace", type=Path, help="another trace: Mooncake .jsonl or Azure .csv, or one of them .gz"
    )
    parser.add_argument("--workers", type=int, default=8, help="aggregated workers (8)")
    parser.add_argument("--blocks", type=int, default=4096, help="blocks of 512 tokens a worker (4096)")
    parser.add_argument("--rate", type=float, help="one rate, raw and spread, in place of all scenarios")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each router (5)")
    arguments = parser.parse_args()
    if arguments.workers < 1 or arguments.blocks < 1 or arguments.seeds < 1:
        parser.error("workers, blocks and seeds must be at least 1")
    if arguments.rate is not None and arguments.rate <= 0:
        parser.error("the rate must be above 0")
    report = Report("routing", machine(), versions())
    os.environ.setdefault("CARGO_TERM_COLOR", "never")
    trace = arguments.trace or CONVERSATIONS
    if arguments.trace and not trace.is_file():
        parser.error(f"{trace} is not there, or not a file")
    binary, decision = build()
    seeds = 1 if arguments.quick else arguments.seeds
    with unpacked(trace) as plain:
        compare(
            report, arguments, Simulator(binary, plain, arguments.workers, arguments.blocks, seeds), seeds
        )
    measure_decisions(report, decision)
    if arguments.json:
        print(report.to_json())
    else:
        Console().print(report.table())


if __name__ == "__main__":
    try:
        main()
    except SimulationFailed as failed:
        sys.exit(str(failed))
