"""Clients that leave at random moments leave nothing behind."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest

from fixtures.mesh import Mesh, wait_until

pytestmark = pytest.mark.timeout(240)


async def test_random_disconnects_leak_nothing(mock_mesh: Mesh) -> None:
    chance = random.Random(7)
    streamed = chance.choices([True, False], k=200)

    async def one(client: httpx.AsyncClient, number: int) -> None:
        body = {
            "model": "default",
            "prompt": [
                (number * 31 + position) % 40_000 + 100 for position in range(chance.randint(5, 2_000))
            ],
            "max_tokens": 200,
            "stream": streamed[number],
        }
        try:
            async with asyncio.timeout(chance.random() * 0.8):
                async with client.stream("POST", f"{mock_mesh.url}/v1/completions", json=body) as answer:
                    async for _ in answer.aiter_lines():
                        pass
        except TimeoutError:
            pass

    limits = httpx.Limits(max_connections=50)
    async with httpx.AsyncClient(timeout=30, limits=limits) as client:
        await asyncio.gather(*(one(client, number) for number in range(200)))
    await wait_until(mock_mesh.idle, 5, "every request, block, transfer and lease to be gone")
    assert mock_mesh.chat("still there?")["choices"][0]["message"]["content"]
