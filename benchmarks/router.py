"""A router's decisions: in process through the binding, and over gRPC to a router's process.

A cycle places a request, reports its prompt as computed and ends it. An eighth of the workers have half of
every prompt cached; every worker has live streams. Beside decisions in process stands the selection core of
Dynamo's crate (`routing_peer/src/decisions.rs`, built with the first run) under the same load, with no Python
around it. Over gRPC 8 requests are under way at once, with 64 workers: on one stream, as gateways do it, and
by 8 clients with a unary call for each of the three, all in one process; CPU is the router process' own.
Prompts are token ids, 257 in blocks of 16 or 4,097 in blocks of 64, and our clients hash them, as gateways
do. Beside them Dynamo's SelectionService with the same load: embedded in its caller's process, without a
network (its CPU is its caller's, too), and served over HTTP, as ours is over gRPC, with 8 clients in one
process. Rounds take turns. Goals: a decision of 16 blocks <= 10 us at 64 workers and <= 30 us
at 512; three times the cycles a second of the faster of the two over the stream, 1.2 times by unary calls
(they were set after the embedded service had been measured with 4,096 tokens).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import grpc.aio
import numpy as np
import uvloop

from harness import ROOT, Cell, Report, cpu_seconds, interleave, main, say
from peers import DYNAMO, dynamo_environment

# isort: split
from fixtures.holders import Members, worker_info
from kvmesh.common import lifecycle
from kvmesh.common.bus import Bus
from kvmesh.common.config import Config, RouterConfig
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.client import Channels
from kvmesh.common.grpc.streams import Stream, StreamHub
from kvmesh.core import Placed, PrefixIndex, Selector, hash_tokens
from kvmesh.router.index import IndexFeed
from kvmesh.router.service import RouterService
from kvmesh.v1.router_pb2 import (
    LeaseReport,
    NumberedRoute,
    ReportRequest,
    RouteRequest,
    RouteResponse,
    RouteStreamRequest,
    RouteStreamResponse,
)
from kvmesh.v1.router_pb2_grpc import RouterServiceStub

METHOD = "/kvmesh.v1.RouterService/RouteStream"
# Over gRPC: blocks of a prompt, and tokens of a block. A prompt has a token more.
SHAPES = ((16, 16), (64, 64))
BLOCK = 16
AT_ONCE = 8
WORKERS = 64
# Of a decision in process, by workers, with prompts of 16 blocks.
GOALS_US = {64: 10.0, 512: 30.0}
CORE = f"dynamo-kv-router {DYNAMO}"
PEERS = {f"Dynamo {DYNAMO}": "embedded", f"Dynamo {DYNAMO} over HTTP": "served"}
# Each client has a connection of its own.
OWN = [("grpc.use_local_subchannel_pool", 1)]


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
            selector.report(now + 0.2, [(outcome.lease, True, 1, 0.0, False)])
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


def selection_core() -> Path:
    """The peer's side of `in_process`, built if need be. RuntimeError when it cannot be."""
    crate, target = ROOT / "benchmarks" / "routing_peer", ROOT / "rust" / "target" / "peer"
    build = ["cargo", "build", "--release", "--quiet", "--locked", "--features", "decisions"]
    build += ["--manifest-path", str(crate / "Cargo.toml"), "--target-dir", str(target)]
    say("building the peer's selection core (some minutes the first time)")
    built = subprocess.run([*build, "--bin", "decisions"], capture_output=True, text=True, check=False)
    if built.returncode:
        raise RuntimeError(f"its selection core cannot be built: {built.stderr.strip()[-300:]}")
    return target / "release" / "decisions"


async def decide(report: Report, rounds: int, turns: int) -> None:
    """In process: ours, and the peer's where it can be had."""
    core = None
    try:
        core = selection_core()
    except RuntimeError as error:
        say(f"Dynamo is left out: {error}")
    for workers, blocks in itertools.product((8, 64, 512), (16, 191)):
        say(f"{workers} workers, {blocks} blocks")
        load = workers, blocks, rounds

        async def ours(load: tuple[int, int, int] = load) -> dict[str, float]:
            return in_process(*load)

        async def theirs(load: tuple[int, int, int] = load) -> dict[str, float]:
            peer = await asyncio.create_subprocess_exec(str(core), *map(str, load), stdout=-1)
            said, _ = await peer.communicate()
            return json.loads(said)

        found = await interleave({"ours": ours} | ({CORE: theirs} if core else {}), turns)
        figures = found.pop("ours")
        at = f"{workers} workers, {blocks} blocks"
        for figure, name in (
            ("decision", f"decision, {at}"),
            ("p99", f"decision, {at}, p99"),
            ("cycle", f"cycle, {at}"),
        ):
            peers = {peer: of[figure] for peer, of in found.items()}
            report.add(Cell(name, "us", "lower", figures[figure], peers))
        if blocks == 16 and workers in GOALS_US:
            name = f"decision, {at}, absolute"
            report.add(Cell(name, "us", "lower", figures["decision"], goal=GOALS_US[workers]))


class Prompts:
    """Prompts as a gateway has them, of so many blocks of so many tokens."""

    def __init__(self, shape: tuple[int, int]) -> None:
        blocks, self.block_tokens = shape
        tokens = blocks * self.block_tokens + 1
        self.tokens = [
            np.array([random.randrange(50_000) for _ in range(tokens)], dtype=np.uint32) for _ in range(64)
        ]

    def route(self, name: str, number: int) -> RouteRequest:
        tokens = self.tokens[number % 64]
        hashes = hash_tokens(tokens, self.block_tokens).tolist()
        return RouteRequest(request_id=name, prompt_tokens=len(tokens), block_hashes=hashes)


class Caller:
    """Keeps requests under way on one stream; every answer is reported, ended and followed by the next."""

    def __init__(self, cycles: int, shape: tuple[int, int]) -> None:
        self.left = cycles
        self.prompts = Prompts(shape)
        self.sent: dict[int, float] = {}
        self.waits: list[float] = []
        self.numbers = itertools.count(1)
        self.over = asyncio.Event()
        self.stream: Stream

    def ask(self, count: int, reports: list[LeaseReport]) -> None:
        message = RouteStreamRequest(reports=reports)
        for _ in range(min(count, self.left)):
            self.left -= 1
            number = next(self.numbers)
            self.sent[number] = time.perf_counter()
            message.routes.append(
                NumberedRoute(number=number, route=self.prompts.route(f"r{number}", number))
            )
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


async def serve(block_tokens: int) -> None:
    """The router's side, served as its process does: prints its port, and ends with its parent."""
    members = Members()
    config = Config()
    server = lifecycle.RoleServer("router", config, RouterConfig(port=0, metrics_port=0))
    feed = IndexFeed(PrefixIndex(), members, Bus("nats://127.0.0.1:1", "bench"), Channels())
    bus = Bus("nats://127.0.0.1:1", "bench")
    service = RouterService(members, bus, feed, RouterConfig(), random=random.Random(1))
    for number in range(WORKERS):
        members.put(worker_info(f"w{number}", page_size=block_tokens))
    service.add_to(server)
    await server.start()
    service.start()
    server.set_ready(True)
    print(server.port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0)


@asynccontextmanager
async def routing(block_tokens: int) -> AsyncIterator[tuple[int, int]]:
    """A router's process: its pid and port."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    router = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--serve", str(block_tokens), stdin=-1, stdout=-1, env=environment
    )
    assert router.stdin is not None
    assert router.stdout is not None
    port = 0
    while not port:
        line = (await router.stdout.readline()).strip()
        port = int(line) if line.isdigit() else 0
    try:
        yield router.pid, port
    finally:
        router.stdin.close()
        await router.wait()


class Spent:
    """What cycles cost from now on: time, and CPU of the router's process and of this one."""

    def __init__(self, router: int) -> None:
        self.router = router
        self.router_s, self.clients_s = cpu_seconds([router]), time.process_time()
        self.began = time.perf_counter()

    def figures(self, waits: list[float]) -> dict[str, float]:
        """Of so many cycles, which waited for their placements for so many seconds."""
        seconds, ordered = time.perf_counter() - self.began, sorted(waits)
        return {
            "rate": len(waits) / seconds,
            "cpu_us": 1e6 * (cpu_seconds([self.router]) - self.router_s) / len(waits),
            "clients_us": 1e6 * (time.process_time() - self.clients_s) / len(waits),
            "p50_ms": 1e3 * statistics.median(waits),
            "p99_ms": 1e3 * ordered[int(0.99 * len(waits))],
        }


async def over_a_stream(shape: tuple[int, int], cycles: int) -> dict[str, float]:
    """Cycles a second, the router's CPU for each in microseconds, milliseconds from question to answer."""
    hub = StreamHub()
    try:
        async with routing(shape[1]) as (pid, port):
            for count in (cycles // 10, cycles):
                caller = Caller(count, shape)
                caller.stream = hub.open(f"127.0.0.1:{port}", METHOD, caller)
                spent = Spent(pid)
                caller.ask(AT_ONCE, [])
                await caller.over.wait()
                figures = spent.figures(caller.waits)
                caller.stream.cancel()
                assert len(caller.waits) == count
    finally:
        hub.close()
    return figures


async def by_unary_calls(shape: tuple[int, int], cycles: int) -> dict[str, float]:
    """The same figures, of clients that each wait for the answer to every call."""
    prompts = Prompts(shape)
    waits: list[float] = []

    async def client(stub: RouterServiceStub, name: int, count: int) -> None:
        for number in range(count):
            asked = time.perf_counter()
            placed = await stub.Route(prompts.route(f"c{name}-{number}", number))
            waits.append(time.perf_counter() - asked)
            for report in (
                LeaseReport(lease_id=placed.lease.id, prefill_done=True, output_tokens=1),
                LeaseReport(lease_id=placed.lease.id, output_tokens=100, ended=True),
            ):
                await stub.Report(ReportRequest(reports=[report]))

    async with routing(shape[1]) as (pid, port), AsyncExitStack() as channels:
        stubs = [
            RouterServiceStub(
                await channels.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}", OWN))
            )
            for _ in range(AT_ONCE)
        ]
        for count in (cycles // 10, cycles):
            waits.clear()
            spent, each = Spent(pid), count // AT_ONCE
            await asyncio.gather(*(client(stub, name, each) for name, stub in enumerate(stubs)))
            figures = spent.figures(waits)
    return figures


async def dynamo(how: str, shape: tuple[int, int], cycles: int) -> dict[str, float]:
    """The same figures of Dynamo's SelectionService; RuntimeError when it cannot be had."""
    python = dynamo_environment()
    arguments = [how, WORKERS, AT_ONCE, cycles, *shape]
    peer = await asyncio.create_subprocess_exec(
        python,
        Path(__file__).with_name("selection_peer.py"),
        *map(str, arguments),
        stdout=-1,
        stderr=-1,
        env=os.environ | {"DYN_LOG": "error"},
    )
    said, complaint = await peer.communicate()
    if peer.returncode:
        raise RuntimeError(f"SelectionService does not run: {complaint.decode()[-300:]}")
    return json.loads(said.splitlines()[-1])


async def run(report: Report, quick: bool) -> None:
    rounds, turns = (2_000, 1) if quick else (20_000, 3)
    await decide(report, rounds, turns)
    for shape in SHAPES:
        await cycle(report, shape, 2_000 if quick else 20_000, turns)


async def cycle(report: Report, shape: tuple[int, int], cycles: int, turns: int) -> None:
    ways = {"stream": partial(over_a_stream, shape, cycles), "unary": partial(by_unary_calls, shape, cycles)}
    try:
        for name, how in PEERS.items():
            await dynamo(how, shape, AT_ONCE * 10)
            ways[name] = partial(dynamo, how, shape, cycles)
    except RuntimeError as error:
        say(f"Dynamo is left out: {error}")
    found = await interleave(ways, turns)
    blocks, block_tokens = shape
    tokens = f"{blocks * block_tokens + 1:,} tokens"
    for way, said, goal in (("stream", "over a stream", 3.0), ("unary", "by unary calls", 1.2)):
        for figure, unit, label in (
            ("rate", "1/s", "cycles a second"),
            ("cpu_us", "us", "router CPU of a cycle"),
            ("p50_ms", "ms", "question to answer"),
            ("p99_ms", "ms", "question to answer, p99"),
        ):
            peers = {name: found[name][figure] for name in PEERS if name in found}
            better = "higher" if figure == "rate" else "lower"
            wanted = goal if figure == "rate" and peers else None
            note = f"clients' own CPU: {found[way]['clients_us']:.0f} us a cycle" if figure == "rate" else ""
            name = f"{label}, {tokens}, {said}"
            report.add(Cell(name, unit, better, found[way][figure], peers, goal=wanted, note=note))


if __name__ == "__main__":
    if "--serve" in sys.argv:
        lifecycle.run(partial(serve, int(sys.argv[-1])))
    else:
        # The clients', as gateways run on it.
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        main(__file__, run)
