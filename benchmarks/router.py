"""A router's decisions: in process through the binding, and over one gRPC stream to a router's process.

A cycle places a request, reports its prompt as computed and ends it. An eighth of the workers have half of
every prompt cached; every worker has live streams. Over the stream 8 requests are under way at once, with 64
workers and prompts of 16 blocks; CPU is the router process' own. Goals: a decision of 16 blocks <= 10 us at
64 workers and <= 30 us at 512.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import statistics
import sys
import time

from harness import Cell, Report, cpu_seconds, main, say

# isort: split
from fixtures.holders import Members, worker_info
from kvmesh.common.bus import Bus
from kvmesh.common.config import RouterConfig
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.client import Channels
from kvmesh.common.grpc.streams import Stream, StreamHub
from kvmesh.core import Placed, PrefixIndex, Selector
from kvmesh.router.index import IndexFeed
from kvmesh.router.route_stream import RouteStream
from kvmesh.router.service import RouterService
from kvmesh.v1.router_pb2 import (
    LeaseReport,
    NumberedRoute,
    RouteRequest,
    RouteResponse,
    RouteStreamRequest,
    RouteStreamResponse,
)

METHOD = "/kvmesh.v1.RouterService/RouteStream"
BLOCK = 16
AT_ONCE = 8
WORKERS = 64


def in_process(workers: int, blocks: int, rounds: int) -> dict[str, float]:
    """Microseconds of one decision, median and 99th percentile, and of its whole cycle."""
    index = PrefixIndex()
    selector = Selector(index, block_tokens=BLOCK, seed=1, gather_ms=0.0)
    chains = [[random.getrandbits(64) for _ in range(blocks)] for _ in range(64)]
    for number in range(workers):
        worker = selector.add_worker(
            number, "aggregated", hardware_class="one", blocks=100_000, pass_tokens=8192
        )
        holder = index.add_engine(f"w{number}")
        selector.link(worker, holder)
        if number % 8 == 0:
            for chain in chains:
                index.store(holder, chain[: blocks // 2])
    live: list[int] = []
    decisions, cycles = [], []
    now = 0.0
    for number in range(1, rounds + 4 * workers):
        now += 1000.0 / workers
        began = time.perf_counter()
        outcomes = selector.submit(
            now, number, prompt_tokens=blocks * BLOCK + 1, blocks=chains[number % len(chains)]
        )
        decided = time.perf_counter()
        outcomes += selector.tick(now + 0.1)[0] if not outcomes else []
        for outcome in outcomes:
            assert isinstance(outcome, Placed)
            selector.progress(now + 0.2, outcome.lease, prefilled=True, output_tokens=1)
            live.append(outcome.lease)
        if len(live) > 4 * workers:
            selector.end(now + 0.2, live.pop(0))
            decisions.append(1e6 * (decided - began))
            cycles.append(1e6 * (time.perf_counter() - began))
    decisions.sort()
    return {
        "decision": statistics.median(decisions),
        "p99": decisions[int(0.99 * len(decisions))],
        "cycle": statistics.median(cycles),
    }


class Caller:
    """Keeps requests under way on one stream; every answer is reported, ended and followed by the next."""

    def __init__(self, cycles: int) -> None:
        self.left = cycles
        self.sent: dict[int, float] = {}
        self.waits: list[float] = []
        self.numbers = itertools.count(1)
        self.over = asyncio.Event()
        self.stream: Stream
        self.chains = [[random.getrandbits(64) for _ in range(16)] for _ in range(64)]

    def ask(self, count: int, reports: list[LeaseReport]) -> None:
        message = RouteStreamRequest(reports=reports)
        for _ in range(min(count, self.left)):
            self.left -= 1
            number = next(self.numbers)
            self.sent[number] = time.perf_counter()
            route = RouteRequest(
                request_id=f"r{number}", prompt_tokens=257, block_hashes=self.chains[number % 64]
            )
            message.routes.append(NumberedRoute(number=number, route=route))
        self.stream.send(message.SerializeToString())

    def on_message(self, message: bytes) -> None:
        reports: list[LeaseReport] = []
        answers = RouteStreamResponse.FromString(message).answers
        placed: list[RouteResponse] = []
        for answer in answers:
            if answer.WhichOneof("result") == "error":
                raise KvmeshError.from_proto(answer.error)
            if answer.HasField("response"):
                self.waits.append(time.perf_counter() - self.sent.pop(answer.number))
                placed.append(answer.response)
        for response in placed:
            reports.append(LeaseReport(lease_id=response.lease.id, prefill_done=True, output_tokens=1))
            reports.append(LeaseReport(lease_id=response.lease.id, output_tokens=100, ended=True))
        self.ask(len(placed), reports)
        if not self.left and not self.sent:
            self.over.set()

    def on_half_close(self) -> None: ...
    def on_writable(self) -> None: ...

    def on_closed(self, error: KvmeshError | None) -> None:
        self.over.set()


async def serve() -> None:
    """The router's side: prints its port, and ends with its parent."""
    members = Members()
    feed = IndexFeed(PrefixIndex(), members, Bus("nats://127.0.0.1:1", "bench"), Channels())
    bus = Bus("nats://127.0.0.1:1", "bench")
    service = RouterService(members, bus, feed, RouterConfig(), random=random.Random(1))
    for number in range(WORKERS):
        members.put(worker_info(f"w{number}"))
    hub = StreamHub()
    service.start()
    accept = {METHOD: lambda stream: RouteStream(stream, service.routing)}
    print(hub.serve("127.0.0.1", 0, accept, "/nowhere"), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    hub.close()


async def over_a_stream(cycles: int) -> dict[str, float]:
    """Cycles a second, the router's CPU for each in microseconds, milliseconds from question to answer."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    router = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--serve", stdin=-1, stdout=-1, env=environment
    )
    assert router.stdin is not None
    assert router.stdout is not None
    port = 0
    while not port:
        line = (await router.stdout.readline()).strip()
        port = int(line) if line.isdigit() else 0
    hub = StreamHub()
    try:
        for count in (cycles // 10, cycles):
            caller = Caller(count)
            caller.stream = hub.open(f"127.0.0.1:{port}", METHOD, caller)
            cpu, began = cpu_seconds([router.pid]), time.perf_counter()
            caller.ask(AT_ONCE, [])
            await caller.over.wait()
            spent = time.perf_counter() - began
            cpu = cpu_seconds([router.pid]) - cpu
            caller.stream.cancel()
            assert len(caller.waits) == count
    finally:
        hub.close()
        router.stdin.close()
        await router.wait()
    caller.waits.sort()
    return {
        "rate": count / spent,
        "cpu_us": 1e6 * cpu / count,
        "p50_ms": 1e3 * statistics.median(caller.waits),
        "p99_ms": 1e3 * caller.waits[int(0.99 * count)],
    }


async def run(report: Report, quick: bool) -> None:
    rounds = 2_000 if quick else 20_000
    goals = {64: 10.0, 512: 30.0}
    for workers in (8, 64, 512):
        for blocks in (16, 191):
            say(f"{workers} workers, {blocks} blocks")
            found = in_process(workers, blocks, rounds)
            name = f"decision, {workers} workers, {blocks} blocks"
            goal = goals.get(workers) if blocks == 16 else None
            report.add(Cell(name, "us", "lower", found["decision"], goal=goal))
            report.add(Cell(f"{name}, p99", "us", "lower", found["p99"]))
            report.add(Cell(f"cycle, {workers} workers, {blocks} blocks", "us", "lower", found["cycle"]))
    say("over a stream")
    found = await over_a_stream(2_000 if quick else 20_000)
    report.add(Cell("cycles a second over a stream", "1/s", "higher", found["rate"]))
    report.add(Cell("router CPU of a cycle", "us", "lower", found["cpu_us"]))
    report.add(Cell("question to answer", "ms", "lower", found["p50_ms"]))
    report.add(Cell("question to answer, p99", "ms", "lower", found["p99_ms"]))


if __name__ == "__main__":
    if "--serve" in sys.argv:
        asyncio.run(serve())
    else:
        main(__file__, run)
