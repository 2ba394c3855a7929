"""Dynamo's SelectionService under the load of `benchmarks/router.py`; runs in the peer's own environment.

    PYTHON selection_peer.py WORKERS AT_ONCE CYCLES BLOCKS BLOCK_TOKENS

In this process, without a network, as its documentation embeds it. A cycle reserves, completes the prompt and
frees, each a call that is waited for. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time

from dynamo.llm import SelectionService  # pyright: ignore[reportMissingImports]


async def main(workers: int, at_once: int, cycles: int, blocks: int, block_tokens: int) -> None:
    service = SelectionService(indexer_threads=2)
    for number in range(workers):
        await service.upsert_worker(
            {
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
        )
    chance = random.Random(1)
    prompts = [[chance.randrange(50_000) for _ in range(blocks * block_tokens + 1)] for _ in range(64)]
    waits: list[float] = []

    async def client(count: int) -> None:
        for number in range(count):
            asked = time.perf_counter()
            placed = await service.select_and_reserve({"model_name": "m", "token_ids": prompts[number % 64]})
            waits.append(time.perf_counter() - asked)
            await service.prefill_complete(placed["selection_id"])
            await service.free_reservation(placed["selection_id"])

    spent = cpu = 0.0
    for count in (cycles // 10, cycles):
        waits.clear()
        began, used = time.perf_counter(), time.process_time()
        await asyncio.gather(*(client(count // at_once) for _ in range(at_once)))
        spent, cpu = time.perf_counter() - began, time.process_time() - used
    waits.sort()
    figures = {
        "rate": len(waits) / spent,
        "cpu_us": 1e6 * cpu / len(waits),
        "p50_ms": 1e3 * statistics.median(waits),
        "p99_ms": 1e3 * waits[int(0.99 * len(waits))],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
