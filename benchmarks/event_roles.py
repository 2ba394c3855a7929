"""The processes of `events.py`: mock workers that publish at a rate, and a router that is its feed alone.

    python event_roles.py workers NATS_URL | router NATS_URL WORKERS_JSON

Each reads commands from standard input, a JSON object a line, and answers each with one.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from random import Random
from typing import Any, cast

import harness  # noqa: F401 - makes the tests' fixtures importable
from fixtures.holders import Members, worker_info
from fixtures.waiting import eventually
from kvmesh.common import metrics
from kvmesh.common.bus import Bus
from kvmesh.common.config import Config
from kvmesh.common.events.source import PublicationServicer
from kvmesh.common.grpc.client import Channels
from kvmesh.common.lifecycle import RoleServer
from kvmesh.core import PrefixIndex
from kvmesh.engine.contract import BlocksRemoved, BlocksStored, KvEvent
from kvmesh.engine.worker.publisher import KvPublisher
from kvmesh.router.index import Holder, IndexFeed
from kvmesh.v1.events_pb2 import KvEventBatch
from kvmesh.v1.events_pb2_grpc import add_EventServiceServicer_to_server

WORKERS = 4
CHAIN = 16
TICK_S = 0.001
# Chains that are hashed over and over, so that making them costs nothing while it is measured.
POOL = 1 << 14


class MeasuredBus:
    """The real bus; notes what each batch takes on the wire and when its first event was taken."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.on_reconnect = bus.on_reconnect
        self.bytes = 0
        self.since: float | None = None
        self.taken: list[float] = []

    def publish(self, subject: str, payload: bytes, headers: dict[str, str]) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        block = len("NATS/1.0\r\n") + len(lines) + 2
        total = block + len(payload)
        self.bytes += len(f"HPUB {subject} {block} {total}\r\n") + total + 2
        self.taken.append(self.since if self.since is not None else time.monotonic())
        self.since = None
        self._bus.publish(subject, payload, headers)


class Worker:
    def __init__(self, number: int, bus: Bus) -> None:
        self.id = f"bench-{number}"
        self.bus = MeasuredBus(bus)
        self.publisher = KvPublisher(cast(Bus, self.bus), self.id, 1, "node", metrics.worker("aggregated"))
        self.stored: deque[list[int]] = deque()
        random = Random(number)
        self._chains = [[random.getrandbits(64) for _ in range(CHAIN)] for _ in range(POOL // WORKERS)]
        self._next = 0

    async def serve(self) -> str:
        config = Config()
        config.worker.port = config.worker.metrics_port = 0
        server = RoleServer("decode", config, config.worker)
        servicer = PublicationServicer(self.publisher.publication)
        server.add_service("kvmesh.v1.EventService", add_EventServiceServicer_to_server, servicer)
        await server.start()
        self.publisher.publication.start()
        return server.address

    def step(self, chains: int, *, grow: bool = False) -> int:
        """An engine's step: store chains and, unless it shall grow, evict as many. Block operations."""
        events: list[KvEvent] = []
        for _ in range(chains):
            chain = self._chains[self._next % len(self._chains)]
            if grow:
                chain = [block ^ self._next for block in chain]
            self._next += 1
            events.append(BlocksStored(chain))
            if not grow:
                self.stored.append(chain)
        while len(self.stored) > len(self._chains) // 2:
            events.append(BlocksRemoved(self.stored.popleft()))
        if self.bus.since is None:
            self.bus.since = time.monotonic()
        self.publisher.take(events)
        return sum(len(event.hashes) for event in events)  # pyright: ignore[reportAttributeAccessIssue]


async def workers(url: str) -> None:
    bus = Bus(url, "workers")
    await bus.start()
    made = [Worker(number, bus) for number in range(WORKERS)]
    addresses = {worker.id: await worker.serve() for worker in made}
    await eventually(lambda: bus.connected)
    answer({"workers": addresses})
    async for command in commands():
        before = [(worker.bus.bytes, len(worker.bus.taken)) for worker in made]
        began, cpu, operations = time.monotonic(), time.process_time(), 0
        if "grow" in command:
            for worker in made:
                while len(worker.publisher._record) < command["grow"] // WORKERS:
                    worker.step(64, grow=True)
                    await asyncio.sleep(0)
        else:
            # Steps keep to the clock; a process that is late does what it missed in larger ones.
            chains_a_second = command["rate"] / (2 * CHAIN)
            done, end = 0, began + command["seconds"]
            while (now := time.monotonic()) < end:
                due = int((now - began) * chains_a_second) // WORKERS
                if due > done:
                    for worker in made:
                        operations += worker.step(due - done)
                    done = due
                await asyncio.sleep(TICK_S)
        took = time.monotonic() - began
        for worker in made:
            worker.publisher.publication.flush()
        answer(
            {
                "operations": operations,
                "seconds": took,
                "cpu": time.process_time() - cpu,
                "bytes": sum(w.bus.bytes - b for w, (b, _) in zip(made, before, strict=True)),
                "sequences": {worker.id: worker.publisher.publication.sequence for worker in made},
                "taken": {
                    worker.id: {n + 1: worker.bus.taken[n] for n in range(first, len(worker.bus.taken))}
                    for worker, (_, first) in zip(made, before, strict=True)
                },
            }
        )


class MeasuredFeed(IndexFeed):
    """The router's feed; notes when each batch had been dealt with."""

    applied: dict[str, dict[int, float]]

    def _receive(self, holder: Holder, batch: KvEventBatch) -> None:
        super()._receive(holder, batch)
        self.applied.setdefault(holder.id, {})[batch.sequence] = time.monotonic()


async def router(url: str, addresses: dict[str, str]) -> None:
    bus, channels, members = Bus(url, "router"), Channels(), Members()
    feed = MeasuredFeed(PrefixIndex(), members, bus, channels)
    feed.applied = {}
    await bus.start()
    await eventually(lambda: bus.connected)
    began, cpu = time.monotonic(), time.process_time()
    for worker, address in addresses.items():
        members.put(worker_info(worker, address=address))
    await feed.start()
    await eventually(lambda: feed.live_holders() == len(addresses), 60)
    answer(
        {
            "seconds": time.monotonic() - began,
            "cpu": time.process_time() - cpu,
            "blocks": feed.index.stats()["held"],
        }
    )
    gaps = 0
    async for command in commands():
        if "reset" in command:
            feed.applied = {}
            gaps, cpu = feed.gaps_total, time.process_time()
            answer({})
            continue
        wanted = command["sequences"]
        await eventually(lambda: all(h.sequence >= wanted[h.id] for h in feed.holders()), 60)  # noqa: B023
        answer(
            {
                "cpu": time.process_time() - cpu,
                "gaps": feed.gaps_total - gaps,
                "divergences": feed.divergences_total,
                "applied": feed.applied,
            }
        )


async def commands() -> AsyncIterator[dict[str, Any]]:
    reader = asyncio.StreamReader(limit=1 << 26)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        yield json.loads(line)


def answer(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    import structlog

    structlog.configure(logger_factory=structlog.WriteLoggerFactory(file=sys.stderr))
    if sys.argv[1] == "workers":
        asyncio.run(workers(sys.argv[2]))
    else:
        asyncio.run(router(sys.argv[2], json.loads(sys.argv[3])))
