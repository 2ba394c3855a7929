"""Prefill and decode on two engines against one aggregated engine: TTFT, and the KV transfer's speed.

Both meshes run SGLang with the same arguments and get the same prompts in turn. The transfer's speed is
what the prefill engine measured for the request (from the end of prefill until the KV was handed
over); the limit is a NIXL write of the same bytes between two processes in as many pieces as the model
has K and V buffers. Goal: transfer >= 70 % of bare NIXL.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from pathlib import Path

from harness import Cell, Mesh, Report, interleave, main, mesh
from raw_nixl import RawNixl
from sse_client import stream_completion

ENGINE = {"kind": "sglang", "args": {"max_total_tokens": 16384}}
PROMPTS = (128, 512, 2048)
OUTPUT_TOKENS = 8
# SmolLM2-135M: K and V of 30 layers.
PIECES = 60


async def ask(served: Mesh, prompt_tokens: int) -> dict[str, float]:
    prompt = [random.randrange(1_000, 40_000) for _ in range(prompt_tokens)]
    times = await stream_completion(served.url, prompt, OUTPUT_TOKENS, kvmesh={"explain": True})
    timing = times.kvmesh["timing_ms"]
    return {"ttft_ms": 1e3 * (times.tokens[0] - times.sent), "transfer_ms": timing["transfer"]}


async def run(report: Report, quick: bool) -> None:
    rounds = 3 if quick else 9
    with tempfile.TemporaryDirectory() as directory:
        aggregated = {"prefill": 0, "decode": 0, "aggregated": 1}
        with (
            mesh(Path(directory, "split"), {"engine": ENGINE}) as split,
            mesh(Path(directory, "aggregated"), {"engine": ENGINE, "workers": aggregated}) as whole,
        ):
            worker = split.workers()["prefill-0"]
            for tokens in PROMPTS:
                size = -(-tokens // worker["page_size"]) * worker["block_bytes"]
                with RawNixl(size, PIECES) as raw:

                    async def bare_copy(raw: RawNixl = raw) -> dict[str, float]:
                        return {"transfer_ms": 1e3 * statistics.median(raw.move() for _ in range(4))}

                    result = await interleave(
                        {
                            "split": lambda n=tokens: ask(split, n),
                            "aggregated": lambda n=tokens: ask(whole, n),
                            "raw": bare_copy,
                        },
                        rounds,
                    )
                ours, bare, raw_ms = result["split"], result["aggregated"], result["raw"]["transfer_ms"]
                report.add(
                    Cell(
                        f"TTFT, {tokens} tokens",
                        "ms",
                        "lower",
                        ours["ttft_ms"],
                        limit=bare["ttft_ms"],
                        note="limit: one aggregated engine",
                    )
                )
                report.add(
                    Cell(
                        f"transfer, {tokens} tokens",
                        "MB/s",
                        "higher",
                        size / 1e3 / ours["transfer_ms"],
                        limit=size / 1e3 / raw_ms,
                        goal=0.7,
                        note=f"{size / 1e6:.1f} MB in {ours['transfer_ms']:.1f} ms; limit: bare NIXL write",
                    )
                )


if __name__ == "__main__":
    main(__file__, run)
