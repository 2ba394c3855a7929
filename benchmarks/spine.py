"""What the mesh adds to a bare engine: TTFT, time and CPU per token, CPU per request, and idle CPU.

The same SGLang engine, aggregated, is driven at its scheduler's wire in this process and through the
whole mesh (HTTP, tokenizer, router, gRPC, worker) in turn. For TTFT, streams begin one after another within
`SPREAD_S`; of those that begin at one instant an engine's first batch has as many as have reached it before
its next step, and the rest wait for that batch: a cell of its own. CPU is that of every process of the mesh
but the engine's own, less what the same processes take in an idle stretch just before, for the idle
part is of the same size as what is measured; it has a cell of its own, and notes have the sum of both.
Goals: added TTFT <= 5 ms; CPU per token <= 0.1 ms at 8 streams and <= 0.4 ms at 1; an idle
prefill + decode mesh, engines included, under 25 % of one core.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from harness import Cell, Report, cpu_seconds, interleave, main, mesh, say
from kvmesh.common.config import load_config
from kvmesh.engine.contract import EngineRequest, Role, Sampling, StepOutput
from kvmesh.engine.model import resolve_model
from kvmesh.engine.sglang.engine import SglangEngine
from sse_client import stream_completion

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 192
IDLE_S = 5.0
# Of rounds that are for TTFT: the output's length, and within which time streams begin.
FEW_TOKENS = 32
SPREAD_S = 2.0
ENGINE = {"kind": "sglang", "args": {"max_total_tokens": 16384}}


@dataclass
class Load:
    """What one round asks for, and the times of its requests in seconds."""

    tokens: int
    # Seconds after the round's start at which each stream begins.
    begin: Sequence[float]
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        return {
            "ttft_ms": 1e3 * statistics.median(self.first),
            "itl_ms": 1e3 * statistics.median(self.between),
            "whole_ms": 1e3 * statistics.median(self.whole),
        }

    def add(self, start: float, first: float, last: float) -> None:
        self.first.append(first - start)
        self.between.append((last - first) / (self.tokens - 1))
        self.whole.append(last - start)


def fresh_prompt() -> list[int]:
    """Random ids: nothing of it is cached anywhere."""
    return [random.randrange(1_000, 40_000) for _ in range(PROMPT_TOKENS)]


async def direct(engine: SglangEngine, load: Load) -> dict[str, float]:
    async def one(after_s: float) -> None:
        await asyncio.sleep(after_s)
        done = asyncio.get_running_loop().create_future()
        times: list[float] = []

        def sink(outputs: list[StepOutput]) -> None:
            for output in outputs:
                if output.token_ids:
                    times.append(time.perf_counter())
                if output.finish is not None and not done.done():
                    done.set_result(None)

        sampling = Sampling(temperature=0, max_new_tokens=load.tokens, ignore_eos=True)
        start = time.perf_counter()
        engine.submit(EngineRequest("bench", fresh_prompt(), sampling), sink)
        await done
        load.add(start, times[0], times[-1])

    await asyncio.gather(*map(one, load.begin))
    return load.figures()


async def through_mesh(url: str, load: Load) -> dict[str, float]:
    async def one(after_s: float) -> None:
        await asyncio.sleep(after_s)
        times = await stream_completion(url, fresh_prompt(), load.tokens)
        load.add(times.sent, times.tokens[0], times.tokens[-1])

    await asyncio.gather(*map(one, load.begin))
    return load.figures()


async def with_cpu(url: str, pids: list[int], load: Load) -> dict[str, float]:
    """`through_mesh`, and what it took of the CPU."""
    idle = await idle_rate(pids, IDLE_S)
    before, start = cpu_seconds(pids), time.perf_counter()
    figures = await through_mesh(url, load)
    await asyncio.sleep(0.2)  # the reports that follow a request belong to it
    gross = cpu_seconds(pids) - before
    cpu = gross - idle * (time.perf_counter() - start)
    streams = len(load.begin)
    return figures | {
        "cpu_ms_per_token": 1e3 * cpu / (streams * load.tokens),
        "cpu_ms_per_request": 1e3 * cpu / streams,
        "gross_ms_per_token": 1e3 * gross / (streams * load.tokens),
    }


def split_processes(supervisor: int) -> tuple[list[int], list[int]]:
    """(mesh, engine) process ids below the supervisor; SGLang names its schedulers' processes."""
    mesh_pids, engine_pids = [supervisor], []
    for process in psutil.Process(supervisor).children(recursive=True):
        title = " ".join(process.cmdline())
        is_engine = title.startswith("sglang::") or "multiprocessing" in title
        (engine_pids if is_engine else mesh_pids).append(process.pid)
    return mesh_pids, engine_pids


async def measure_added(report: Report, rounds: int, home: Path) -> None:
    # The same for both: an engine takes as many threads as the others of its machine leave it.
    workers = {"prefill": 0, "decode": 0, "aggregated": 1}
    settings = {"engine": ENGINE, "workers": workers, "kvbm": {"enabled": False}}
    config = load_config(overrides=settings)
    engine = SglangEngine(config, Role.AGGREGATED, model_path=resolve_model(config).path, worker_id="bench")
    say("starting the bare engine")
    await engine.start()
    try:
        with mesh(home, settings) as served:
            pids, _ = split_processes(served.supervisor_pid())
            spread = [SPREAD_S * place / 8 for place in range(8)]
            for at, begin in (("1 stream", [0.0]), ("8 streams", spread), ("8 streams at once", [0.0] * 8)):
                result = await interleave(
                    {
                        "direct": lambda at=begin: direct(engine, Load(FEW_TOKENS, at)),
                        "mesh": lambda at=begin: through_mesh(served.url, Load(FEW_TOKENS, at)),
                    },
                    (24 if len(begin) == 1 else 5) * rounds,
                )
                bare, ours = result["direct"]["ttft_ms"], result["mesh"]["ttft_ms"]
                goal = None if at.endswith("at once") else 5.0
                note = f"mesh {ours:.1f} ms, bare engine {bare:.1f} ms"
                report.add(Cell(f"added TTFT, {at}", "ms", "lower", ours - bare, goal=goal, note=note))
            for at, begin, cpu_goal in (("1 stream", [0.0], 0.4), ("8 streams", [0.0] * 8, 0.1)):
                result = await interleave(
                    {
                        "direct": lambda at=begin: direct(engine, Load(OUTPUT_TOKENS, at)),
                        "mesh": lambda at=begin: with_cpu(served.url, pids, Load(OUTPUT_TOKENS, at)),
                    },
                    2 * rounds,
                )
                add_tokens(report, at, cpu_goal, result["direct"], result["mesh"])
    finally:
        await engine.close()


def add_tokens(
    report: Report, at: str, cpu_goal: float, bare: dict[str, float], ours: dict[str, float]
) -> None:
    note = f"mesh {ours['itl_ms']:.2f} ms, bare engine {bare['itl_ms']:.2f} ms"
    report.add(Cell(f"added ITL, {at}", "ms", "lower", ours["itl_ms"] - bare["itl_ms"], note=note))
    added = ours["whole_ms"] - bare["whole_ms"]
    note = f"from sending to the last of {OUTPUT_TOKENS} tokens"
    report.add(Cell(f"added time per request, {at}", "ms", "lower", added, note=note))
    note = f"{ours['gross_ms_per_token']:.3f} with what idling takes"
    per_token = ours["cpu_ms_per_token"]
    report.add(Cell(f"CPU per token, {at}", "ms", "lower", per_token, goal=cpu_goal, note=note))
    note = f"{PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS} out"
    report.add(Cell(f"CPU per request, {at}", "ms", "lower", ours["cpu_ms_per_request"], note=note))


async def measure_idle(report: Report, seconds: float, home: Path) -> None:
    with mesh(home, {"engine": ENGINE}) as served:
        await stream_completion(served.url, fresh_prompt(), OUTPUT_TOKENS)
        pids, engine_pids = split_processes(served.supervisor_pid())
        ours, engines = await asyncio.gather(idle_rate(pids, seconds), idle_rate(engine_pids, seconds))
    note = f"of it {100 * engines:.1f} in the engines' processes"
    total = 100 * (ours + engines)
    report.add(Cell("idle prefill + decode mesh", "% of a core", "lower", total, goal=25.0, note=note))


async def idle_rate(pids: list[int], seconds: float) -> float:
    """CPU seconds a second of these processes while nothing is asked of them."""
    await asyncio.sleep(2)  # what the last request left to do
    before, start = cpu_seconds(pids), time.perf_counter()
    await asyncio.sleep(seconds)
    return (cpu_seconds(pids) - before) / (time.perf_counter() - start)


async def run(report: Report, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        await measure_added(report, 1 if quick else 4, Path(directory, "added"))
        await measure_idle(report, 5 if quick else 20, Path(directory, "idle"))


if __name__ == "__main__":
    main(__file__, run)
