"""Real SGLang under eviction: the router's index stays what the engine's own events say."""

from __future__ import annotations

import asyncio
import json
import random

import httpx
import pytest

from fixtures.mesh import Mesh, wait_until

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]

PROMPTS = 300
CLIENTS = 8


async def test_the_index_is_right_while_a_small_pool_evicts(small_mesh: Mesh) -> None:
    """300 prompts of up to 400 tokens through a device pool of 2,048 tokens."""
    mesh = small_mesh
    chance = random.Random(7)
    # Some begin alike, so that chains are shared and cut.
    heads = [[chance.randrange(1_000, 40_000) for _ in range(64)] for _ in range(10)]
    prompts = [
        chance.choice(heads) + [chance.randrange(1_000, 40_000) for _ in range(chance.randrange(300))]
        for _ in range(PROMPTS)
    ]
    codes: list[int] = []

    async def client() -> None:
        async with httpx.AsyncClient(timeout=120) as http:
            while prompts:
                body = {"model": "default", "prompt": prompts.pop(), "max_tokens": 2, "ignore_eos": True}
                codes.append((await http.post(f"{mesh.url}/v1/completions", json=body)).status_code)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    assert codes == [200] * PROMPTS

    def right() -> bool:
        run = mesh.command("index", "verify", "--json", check=False)
        results = {part["result"] for part in json.loads(run.stdout)["comparisons"]}
        (worker,) = mesh.status()["workers"]
        # The engine's own count of what it caches, which no event of ours had a part in.
        return (
            run.returncode == 0
            and results == {"equal"}
            and worker["indexed_blocks"] == worker["blocks_cached"]
        )

    await wait_until(right, 20.0, "the index to be what the engine caches")
    (worker,) = mesh.status()["workers"]
    assert 0 < worker["blocks_cached"] <= worker["blocks_total"]
    (stats,) = json.loads(mesh.command("index", "stats", "--json").stdout)
    assert stats["index"]["divergences"] == 0
