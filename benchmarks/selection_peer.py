"""Dynamo's SelectionService under the load of `benchmarks/router.py`; runs in the peer's own environment.

    PYTHON selection_peer.py embedded|served WORKERS AT_ONCE CYCLES BLOCKS BLOCK_TOKENS

Embedded it runs in this process, without a network; served it is a process of its own
(`dynamo.select_service`), asked over HTTP, and the CPU is that process' alone. A cycle reserves, completes
the prompt and frees, each a call that is waited for. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import uvloop


class Service(Protocol):
    """What a client asks."""

    async def upsert_worker(self, worker: dict[str, Any]) -> object: ...

    async def select_and_reserve(self, request: dict[str, Any]) -> dict[str, Any]: ...

    async def prefill_complete(self, selection: str) -> object: ...

    async def free_reservation(self, selection: str) -> object: ...

    def cpu(self) -> float:
        """Seconds of processor time used so far."""
        ...


@asynccontextmanager
async def embedded() -> AsyncIterator[Service]:
    from dynamo.llm import SelectionService  # pyright: ignore[reportMissingImports]

    service = SelectionService(indexer_threads=2)
    service_cpu = time.process_time

    class Embedded:
        upsert_worker = service.upsert_worker
        select_and_reserve = service.select_and_reserve
        prefill_complete = service.prefill_complete
        free_reservation = service.free_reservation

        def cpu(self) -> float:
            return service_cpu()

    yield Embedded()


class Served:
    """`dynamo.select_service` at a URL."""

    def __init__(self, session: Any, pid: int) -> None:
        self._session = session
        self._pid = pid

    async def upsert_worker(self, worker: dict[str, Any]) -> object:
        return await self._ask("POST", "/workers", worker)

    async def select_and_reserve(self, request: dict[str, Any]) -> dict[str, Any]:
        return await self._ask("POST", "/select_and_reserve", request)

    async def prefill_complete(self, selection: str) -> object:
        return await self._ask("POST", f"/reservations/{selection}/prefill_complete")

    async def free_reservation(self, selection: str) -> object:
        return await self._ask("DELETE", f"/reservations/{selection}")

    def cpu(self) -> float:
        # A process's own CPU clock, clock_getcpuclockid(3).
        return time.clock_gettime(~self._pid << 3 | 2)

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        async with self._session.request(method, path, json=body) as response:
            response.raise_for_status()
            return await response.json()


@asynccontextmanager
async def served() -> AsyncIterator[Service]:
    import aiohttp  # pyright: ignore[reportMissingImports]

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "dynamo.select_service", "--port", str(port), "--threads", "2"]
    process = await asyncio.create_subprocess_exec(*command, stdout=-3, stderr=-3)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            for _ in range(600):
                try:
                    async with session.get("/health") as health:
                        health.raise_for_status()
                    break
                except aiohttp.ClientError:
                    await asyncio.sleep(0.1)
            yield Served(session, process.pid)
    finally:
        process.terminate()
        await process.wait()


def worker(number: int, block_tokens: int) -> dict[str, Any]:
    return {
        "worker_id": number + 1,
        "model_name": "m",
        "routing_group": "default",
        "endpoint": f"http://127.0.0.1:{20_000 + number}",
        "block_size": block_tokens,
        "data_parallel_start_rank": 0,
        "data_parallel_size": 1,
        "max_num_batched_tokens": 8192,
        "total_kv_blocks": 100_000,
        # Nobody is there: no events come.
        "kv_events_endpoints": {0: f"tcp://127.0.0.1:{30_000 + number}"},
    }


async def main(how: str, workers: int, at_once: int, cycles: int, blocks: int, block_tokens: int) -> None:
    chance = random.Random(1)
    prompts = [[chance.randrange(50_000) for _ in range(blocks * block_tokens + 1)] for _ in range(64)]
    waits: list[float] = []

    async def client(service: Service, count: int) -> None:
        for number in range(count):
            asked = time.perf_counter()
            placed = await service.select_and_reserve({"model_name": "m", "token_ids": prompts[number % 64]})
            waits.append(time.perf_counter() - asked)
            await service.prefill_complete(placed["selection_id"])
            await service.free_reservation(placed["selection_id"])

    spent = cpu = 0.0
    async with {"embedded": embedded, "served": served}[how]() as service:
        for number in range(workers):
            await service.upsert_worker(worker(number, block_tokens))
        for count in (cycles // 10, cycles):
            waits.clear()
            began, used = time.perf_counter(), service.cpu()
            await asyncio.gather(*(client(service, count // at_once) for _ in range(at_once)))
            spent, cpu = time.perf_counter() - began, service.cpu() - used
    waits.sort()
    figures = {
        "rate": len(waits) / spent,
        "cpu_us": 1e6 * cpu / len(waits),
        "p50_ms": 1e3 * statistics.median(waits),
        "p99_ms": 1e3 * waits[int(0.99 * len(waits))],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], *map(int, sys.argv[2:])))
