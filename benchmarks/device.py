"""Copies of scattered KV pages between a GPU and pinned memory, beside one copy of the same bytes.

The pages of 32 layers of K and V, 16 tokens of 8 heads of 128 in bf16 each, as SGLang keeps them, in random
order, by the code that the store's linker uses. Limit: one copy between contiguous pinned and device memory
of the same bytes. Goal: 85 % of it. Without a CUDA device there is nothing to measure.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable

import torch

from harness import Cell, Report, interleave, main, say
from kvmesh.engine.sglang.device_pages import Staging

SEGMENTS, SEGMENT_BYTES = 64, 16 * 8 * 128 * 2
POOL_PAGES, MOVED_PAGES = 2048, 32
REPEATS = 50
GOAL = 0.85


def timed(copy: Callable[[], object]) -> Callable[[], Awaitable[dict[str, float]]]:
    async def once() -> dict[str, float]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(REPEATS):
            copy()
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / REPEATS
        return {"gb_s": SEGMENTS * SEGMENT_BYTES * MOVED_PAGES / seconds / 1e9}

    return once


async def run(report: Report, quick: bool) -> None:
    if not torch.cuda.is_available():
        say("no CUDA device: nothing is measured")
        return
    shape = (POOL_PAGES, SEGMENT_BYTES)
    pool = [torch.randint(256, shape, dtype=torch.uint8, device="cuda") for _ in range(SEGMENTS)]
    ids = random.Random(1).sample(range(POOL_PAGES), MOVED_PAGES)
    staging = Staging(MOVED_PAGES, pool)
    size = SEGMENTS * SEGMENT_BYTES * MOVED_PAGES
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    ways = {
        "device to host": (lambda: staging.gather(ids), lambda: pinned.copy_(device)),
        "host to device": (lambda: staging.scatter(ids, 0, SEGMENTS), lambda: device.copy_(pinned)),
    }
    for name, (ours, whole) in ways.items():
        figures = await interleave({"ours": timed(ours), "limit": timed(whole)}, 3 if quick else 9)
        report.add(
            Cell(
                f"{name}, {MOVED_PAGES} scattered pages",
                "GB/s",
                "higher",
                figures["ours"]["gb_s"],
                limit=figures["limit"]["gb_s"],
                goal=GOAL,
                note=f"{torch.cuda.get_device_name()}; limit: one pinned copy of {size >> 20} MiB",
            )
        )


if __name__ == "__main__":
    main(__file__, run)
