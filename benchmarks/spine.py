"""What the mesh adds to a bare engine: TTFT, time and CPU per token, CPU per request, and idle CPU.

The same SGLang engine, aggregated, is driven at its scheduler's wire in this process and through the
whole mesh (HTTP, tokenizer, router, gRPC, worker) in turn. CPU is that of every process of the mesh
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
ENGINE = {"kind": "sglang", "args": {"max_total_tokens": 16384}}


@dataclass
class Load:
    """Times of one round's requests, seconds."""

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
        self.between.append((last - first) / (OUTPUT_TOKENS - 1))
        self.whole.append(last - start)


def fresh_prompt() -> list[int]:
    """Random ids: nothing of it is cached anywhere."""
    return [random.randrange(1_000, 40_000) for _ in range(PROMPT_TOKENS)]


async def direct(engine: SglangEngine, streams: int) -> dict[str, float]:
    load = Load()

    async def one() -> None:
        done = asyncio.get_running_loop().create_future()
        times: list[float] = []

        def sink(outputs: list[StepOutput]) -> None:
            for output in outputs:
                if output.token_ids:
                    times.append(time.perf_counter())
                if output.finish is not None and not done.done():
                    done.set_result(None)

        sampling = Sampling(temperature=0, max_new_tokens=OUTPUT_TOKENS, ignore_eos=True)
        start = time.perf_counter()
        engine.submit(EngineRequest("bench", fresh_prompt(), sampling), sink)
        await done
        load.add(start, times[0], times[-1])

    await asyncio.gather(*(one() for _ in range(streams)))
    return load.figures()


async def through_mesh(url: str, pids: list[int], streams: int) -> dict[str, float]:
    load = Load()
    idle = await idle_rate(pids, IDLE_S)

    async def one() -> None:
        times = await stream_completion(url, fresh_prompt(), OUTPUT_TOKENS)
        load.add(times.sent, times.tokens[0], times.tokens[-1])

    before, start = cpu_seconds(pids), time.perf_counter()
    await asyncio.gather(*(one() for _ in range(streams)))
    await asyncio.sleep(0.2)  # the reports that follow a request belong to it
    gross = cpu_seconds(pids) - before
    cpu = gross - idle * (time.perf_counter() - start)
    return load.figures() | {
        "cpu_ms_per_token": 1e3 * cpu / (streams * OUTPUT_TOKENS),
        "cpu_ms_per_request": 1e3 * cpu / streams,
        "gross_ms_per_token": 1e3 * gross / (streams * OUTPUT_TOKENS),
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
    config = load_config(overrides={"engine": ENGINE})
    engine = SglangEngine(config, Role.AGGREGATED, model_path=resolve_model(config).path, worker_id="bench")
    say("starting the bare engine")
    await engine.start()
    workers = {"prefill": 0, "decode": 0, "aggregated": 1}
    try:
        with mesh(home, {"engine": ENGINE, "workers": workers, "kvbm": {"enabled": False}}) as served:
            pids, _ = split_processes(served.supervisor_pid())
            await stream_completion(served.url, fresh_prompt(), OUTPUT_TOKENS)
            for streams, cpu_goal in ((1, 0.4), (8, 0.1)):
                result = await interleave(
                    {
                        "direct": lambda n=streams: direct(engine, n),
                        "mesh": lambda n=streams: through_mesh(served.url, pids, n),
                    },
                    rounds,
                )
                bare, ours = result["direct"], result["mesh"]
                at = f"{streams} stream{'s' if streams > 1 else ''}"
                note = f"mesh {ours['ttft_ms']:.1f} ms, bare engine {bare['ttft_ms']:.1f} ms"
                report.add(
                    Cell(
                        f"added TTFT, {at}",
                        "ms",
                        "lower",
                        ours["ttft_ms"] - bare["ttft_ms"],
                        goal=5.0,
                        note=note,
                    )
                )
                note = f"mesh {ours['itl_ms']:.2f} ms, bare engine {bare['itl_ms']:.2f} ms"
                report.add(
                    Cell(f"added ITL, {at}", "ms", "lower", ours["itl_ms"] - bare["itl_ms"], note=note)
                )
                added = ours["whole_ms"] - bare["whole_ms"]
                note = f"from sending to the last of {OUTPUT_TOKENS} tokens"
                report.add(Cell(f"added time per request, {at}", "ms", "lower", added, note=note))
                note = f"{ours['gross_ms_per_token']:.3f} with what idling takes"
                per_token = ours["cpu_ms_per_token"]
                report.add(Cell(f"CPU per token, {at}", "ms", "lower", per_token, goal=cpu_goal, note=note))
                report.add(
                    Cell(
                        f"CPU per request, {at}",
                        "ms",
                        "lower",
                        ours["cpu_ms_per_request"],
                        note=f"{PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS} out",
                    )
                )
    finally:
        await engine.close()


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
        await measure_added(report, 2 if quick else 9, Path(directory, "added"))
        await measure_idle(report, 5 if quick else 20, Path(directory, "idle"))


if __name__ == "__main__":
    main(__file__, run)
