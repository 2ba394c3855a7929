"""Prefill and decode on two engines against one aggregated engine: TTFT, and the KV transfer's speed.

Both meshes run SGLang with the same arguments and get prompts of the same lengths. They run one after the
other, several times in turn: three engines at once would share the cores of a small machine and be measured
against each other. The transfer's speed is what the prefill engine measured for the request (from the end of
prefill until the KV was handed over); the limit is a NIXL write of the same bytes between two processes in as
many pieces as the model has K and V buffers, in between the requests. Goal: transfer >= 70 % of bare NIXL.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from harness import Cell, Mesh, Report, main, mesh, say
from raw_nixl import RawNixl
from sse_client import stream_completion

ENGINE = {"kind": "sglang", "args": {"max_total_tokens": 16384}}
PROMPTS = (128, 512, 2048)
OUTPUT_TOKENS = 8
# SmolLM2-135M: K and V of 30 layers.
PIECES = 60


# A mesh is started anew each time, which takes longer than what is measured on it.
TURNS, QUICK_TURNS = 3, 1
ROUNDS = 5

# What was measured of one kind, by tokens of the prompt.
Times = defaultdict[int, list[float]]


@dataclass
class Result:
    """All times in milliseconds."""

    split: Times = field(default_factory=lambda: defaultdict(list))
    aggregated: Times = field(default_factory=lambda: defaultdict(list))
    transfer: Times = field(default_factory=lambda: defaultdict(list))
    raw: Times = field(default_factory=lambda: defaultdict(list))
    transfer_bytes: dict[int, int] = field(default_factory=dict)


async def ask(served: Mesh, prompt_tokens: int) -> tuple[float, float]:
    """TTFT and transfer of a prompt that nothing has seen before, milliseconds."""
    prompt = [random.randrange(1_000, 40_000) for _ in range(prompt_tokens)]
    times = await stream_completion(served.url, prompt, OUTPUT_TOKENS, kvmesh={"explain": True})
    return 1e3 * (times.tokens[0] - times.sent), times.kvmesh["timing_ms"]["transfer"]


async def measure_aggregated(served: Mesh, result: Result) -> None:
    for tokens in PROMPTS:
        await ask(served, tokens)  # a warm-up
        result.aggregated[tokens] += [(await ask(served, tokens))[0] for _ in range(ROUNDS)]


async def measure_split(served: Mesh, result: Result) -> None:
    worker = served.workers()["prefill-0"]
    for tokens in PROMPTS:
        size = -(-tokens // worker["page_size"]) * worker["block_bytes"]
        result.transfer_bytes[tokens] = size
        await ask(served, tokens)  # a warm-up
        with RawNixl(size, PIECES) as raw:
            for _ in range(ROUNDS):
                ttft, transfer = await ask(served, tokens)
                result.split[tokens].append(ttft)
                result.transfer[tokens].append(transfer)
                result.raw[tokens].append(1e3 * statistics.median(raw.move() for _ in range(4)))


async def run(report: Report, quick: bool) -> None:
    result, turns = Result(), QUICK_TURNS if quick else TURNS
    aggregated = {"prefill": 0, "decode": 0, "aggregated": 1}
    for turn in range(turns):
        say(f"turn {turn + 1} of {turns}")
        with tempfile.TemporaryDirectory() as directory:
            home = Path(directory)
            with mesh(home / "aggregated", {"engine": ENGINE, "workers": aggregated}) as served:
                await measure_aggregated(served, result)
            with mesh(home / "split", {"engine": ENGINE}) as served:
                await measure_split(served, result)
    for tokens in PROMPTS:
        split, whole, transfer, raw = (
            statistics.median(times[tokens])
            for times in (result.split, result.aggregated, result.transfer, result.raw)
        )
        note = "limit: one aggregated engine"
        report.add(Cell(f"TTFT, {tokens} tokens", "ms", "lower", split, limit=whole, note=note))
        size = result.transfer_bytes[tokens]
        report.add(
            Cell(
                f"transfer, {tokens} tokens",
                "MB/s",
                "higher",
                size / 1e3 / transfer,
                limit=size / 1e3 / raw,
                goal=0.7,
                note=f"{size / 1e6:.1f} MB in {transfer:.1f} ms; limit: bare NIXL write",
            )
        )


if __name__ == "__main__":
    main(__file__, run)
