"""KV events end to end: mock workers -> NATS -> one router's index, at rising rates.

Four workers are the worker service's own publishers, fed as an engine would: chains of 16 blocks stored and
others removed. The router is its feed and index, in a process of its own. A block operation is one block
stored or removed. A rate is sustained when no batch is lost on the way and the router ends within a second
of the workers. Lag is from the engine's event taken to its batch applied. Everything shares one machine, so
the router's own share is the operations a second of its CPU.
Goals: >= 2 M block operations a second of the router's CPU; lag p99 <= 20 ms at half of what was sustained;
<= 12 bytes on the wire for a block; a router that starts has 10^6 blocks in under 2 s.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

import harness
from fixtures.nats import NatsServer

ROLES = Path(__file__).with_name("event_roles.py")
RATES = (250_000, 500_000, 750_000, 1_000_000, 1_500_000, 2_000_000, 3_000_000)
BLOCKS = 1_000_000


class Role:
    """One of `event_roles.py`'s processes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, *arguments: str) -> Role:
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                str(ROLES),
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=1 << 28,
            )
        )

    async def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line, f"the process ended with {await self._process.wait()}"
        return json.loads(line)

    async def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        return await self.answer()

    async def stop(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


async def at_rate(
    workers: Role, router: Role, nats: psutil.Process, rate: int, seconds: float
) -> dict[str, float]:
    """Publish at a rate; figures of the run, `kept` 1 when the rate was sustained."""
    await router.ask(reset=True)
    server = sum(nats.cpu_times()[:2])
    sent = await workers.ask(rate=rate, seconds=seconds)
    got = await router.ask(sequences=sent["sequences"])
    lags = sorted(
        got["applied"][worker][number] - taken
        for worker, batches in sent["taken"].items()
        for number, taken in batches.items()
        if number in got["applied"].get(worker, {})
    )
    operations = sent["operations"]
    reached = operations / sent["seconds"]
    percentiles = statistics.quantiles(lags, n=100)
    return {
        "rate": reached,
        "kept": float(not got["gaps"] and reached > 0.9 * rate and lags[-1] < 1.0),
        "p50_ms": 1e3 * percentiles[49],
        "p99_ms": 1e3 * percentiles[98],
        "bytes": sent["bytes"] / operations,
        "router_cpu": 1e6 * got["cpu"] / operations,
        "workers_cpu": 1e6 * sent["cpu"] / operations,
        "nats_cpu": 1e6 * (sum(nats.cpu_times()[:2]) - server) / operations,
        "divergences": got["divergences"],
    }


async def measure_rates(report: harness.Report, url: str, nats: psutil.Process, seconds: float) -> None:
    workers = await Role.start("workers", url)
    addresses = (await workers.answer())["workers"]
    router = await Role.start("router", url, json.dumps(addresses))
    try:
        await router.answer()
        await at_rate(workers, router, nats, 1_000_000, 1.5)  # warm-up, and fills the pools
        best: dict[str, float] | None = None
        for rate in RATES:
            run = await at_rate(workers, router, nats, rate, seconds)
            harness.say(
                f"{rate:,}/s asked: " + ", ".join(f"{name} {value:.4g}" for name, value in run.items())
            )
            if not run["kept"]:
                break
            best = run
        assert best is not None, "not even the lowest rate was sustained"
        half = await at_rate(workers, router, nats, round(best["rate"] / 2), 2 * seconds)
    finally:
        await router.stop()
        await workers.stop()
    cpu = best["router_cpu"]
    note = (
        f"CPU seconds a million: router {cpu:.2f}, four workers {best['workers_cpu']:.2f}, "
        f"NATS {best['nats_cpu']:.2f}; {psutil.cpu_count()} cores for all"
    )
    report.add(
        harness.Cell("operations sustained, all on one machine", "1/s", "higher", best["rate"], note=note)
    )
    report.add(harness.Cell("operations a second of router CPU", "1/s", "higher", 1e6 / cpu, goal=2e6))
    report.add(harness.Cell("router CPU a million operations", "s", "lower", cpu))
    at = f"at {half['rate']:,.0f} operations/s"
    report.add(harness.Cell("lag p50, at half of that rate", "ms", "lower", half["p50_ms"], note=at))
    report.add(
        harness.Cell("lag p99, at half of that rate", "ms", "lower", half["p99_ms"], goal=20.0, note=at)
    )
    note = f"{at}, NATS's framing included"
    report.add(
        harness.Cell("bytes on the wire an operation", "B", "lower", half["bytes"], goal=12.0, note=note)
    )
    report.add(harness.Cell("divergences found by digests", "", "lower", half["divergences"], goal=0.0))


async def measure_start(report: harness.Report, url: str, rounds: int) -> None:
    workers = await Role.start("workers", url)
    try:
        addresses = (await workers.answer())["workers"]
        await workers.ask(grow=BLOCKS)
        times, cpus = [], []
        for _ in range(rounds):
            router = await Role.start("router", url, json.dumps(addresses))
            try:
                started = await router.answer()
            finally:
                await router.stop()
            assert started["blocks"] >= BLOCKS, started
            times.append(started["seconds"])
            cpus.append(started["cpu"])
    finally:
        await workers.stop()
    note = f"router CPU {statistics.median(cpus):.2f} s; one process serves all four workers' snapshots"
    cell = "router start to 10^6 blocks complete"
    report.add(harness.Cell(cell, "s", "lower", statistics.median(times), goal=2.0, note=note))


async def run(report: harness.Report, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        server = NatsServer(Path(directory))
        server.start()
        try:
            assert server._process is not None
            nats = psutil.Process(server._process.pid)
            await measure_rates(report, server.url, nats, 2.0 if quick else 6.0)
            await measure_start(report, server.url, 1 if quick else 5)
        finally:
            server.stop()


if __name__ == "__main__":
    harness.main(__file__, run)
