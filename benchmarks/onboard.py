"""What a prompt of 2,000 tokens waits for its first token, by where its KV is, and what offloading costs.

One SGLang engine with a device pool that holds two such prompts, behind the whole mesh. Each round asks a
new prompt (cold), asks it again (device), pushes it out of the device with other prompts and asks again
(host), pushes it out, moves it from host to nvme and asks again (nvme), pushes it out, moves it to the store
of another node, which is a process of its own on this machine, and asks again (network). That a prompt came
from where the cell says is checked by the answer's own count of cached tokens. Then a mesh with KVBM and one
without it take turns with new prompts: time to the first token, in which the pages are written and offloaded,
and between tokens.

Goals: a host hit <= 1.3 times a device hit; the engine slowed by less than 2 %.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import harness  # noqa: F401 - makes the tests' fixtures importable
from fixtures.kvbm import Kvbm
from harness import Cell, Mesh, Report, interleave, main, mesh
from sse_client import Stream, stream_completion

PROMPT_TOKENS = 2_000
OUTPUT_TOKENS = 32
# Two prompts, one being computed, and some blocks to spare.
POOL_TOKENS = 7_168
HOST_BYTES = 1 << 30
AGGREGATED = {"prefill": 0, "decode": 0, "aggregated": 1}
HOST_GOAL, SLOWED_GOAL = 1.3, 1.02
# Seconds until what an engine wrote is in its store.
OFFLOADED_S = 60.0


def config(**kvbm: object) -> dict:
    engine = {"kind": "sglang", "args": {"max_total_tokens": POOL_TOKENS}}
    return {"engine": engine, "workers": AGGREGATED, "kvbm": kvbm}


def fresh_prompt() -> list[int]:
    """Random ids: nothing of it is cached anywhere."""
    return [random.randrange(1_000, 40_000) for _ in range(PROMPT_TOKENS)]


async def ask(served: Mesh, prompt: list[int], output_tokens: int = OUTPUT_TOKENS) -> Stream:
    return await stream_completion(served.url, prompt, output_tokens, kvmesh={"explain": True})


def figures(stream: Stream) -> dict[str, float]:
    between = (stream.tokens[-1] - stream.tokens[0]) / (len(stream.tokens) - 1)
    return {"ttft_ms": 1e3 * (stream.tokens[0] - stream.sent), "itl_ms": 1e3 * between}


@asynccontextmanager
async def other_node(home: Path, served: Mesh) -> AsyncIterator[Kvbm]:
    """Another node's store, which has no engine, on the mesh's bus."""
    store = Kvbm(home, f"nats://127.0.0.1:{served.config['nats']['port']}", HOST_BYTES)
    store.environment |= {
        "KVMESH_NODE": "other",
        "KVMESH_KVBM__ID": "kvbm-other",
        "KVMESH_KVBM__SHM_DIR": "/dev/shm",
    }
    try:
        await store.start()
        yield store
    finally:
        store.end()


class Tiers:
    """A prompt on its way down the tiers."""

    def __init__(self, served: Mesh, other: Kvbm) -> None:
        self._mesh, self._other = served, other
        self._prompt: list[int] = []

    async def cold(self) -> dict[str, float]:
        self._prompt = fresh_prompt()
        return await self._from(None)

    async def device(self) -> dict[str, float]:
        return await self._from("device")

    async def host(self) -> dict[str, float]:
        await self._push_out()
        return await self._from("host")

    async def nvme(self) -> dict[str, float]:
        await self._push_out()
        self._mesh.command("kvbm", "persist")
        self._mesh.command("kvbm", "flush", "--tier", "host")
        return await self._from("nvme")

    async def network(self) -> dict[str, float]:
        await self._push_out()
        other = ("--store", self._other.address)
        own = f"127.0.0.1:{self._mesh.config['kvbm']['port']}"
        self._mesh.command("kvbm", "flush", *other)
        self._mesh.command("kvbm", "warm", "--from", own, *other)
        self._mesh.command("kvbm", "flush")
        return await self._from("network")

    async def _push_out(self) -> None:
        self._wait_until_offloaded()
        for _ in range(POOL_TOKENS // PROMPT_TOKENS + 1):
            await ask(self._mesh, fresh_prompt(), 1)
        self._wait_until_offloaded()

    async def _from(self, tier: str | None) -> dict[str, float]:
        """Ask the prompt. Raises RuntimeError when it did not come from `tier` (None: nowhere)."""
        stream = await ask(self._mesh, self._prompt)
        cached: dict[str, int] = stream.kvmesh["cached_tokens"]
        # At least one token is computed, and so is what does not fill a page.
        wanted = PROMPT_TOKENS * 0.9 if tier else 0
        if sum(cached.values()) < wanted or any(n for name, n in cached.items() if name != tier):
            raise RuntimeError(f"asked from {tier or 'nowhere'}, cached: {cached}")
        return figures(stream)

    def _wait_until_offloaded(self) -> None:
        """Until the store has had no new block for a while."""
        deadline, last = time.monotonic() + OFFLOADED_S, -1
        while time.monotonic() < deadline:
            stored = sum(tier["blocks"] for store in self._mesh.status()["kvbm"] for tier in store["tiers"])
            if stored == last:
                return
            last = stored
            time.sleep(0.5)
        raise RuntimeError(f"blocks still came into the store after {OFFLOADED_S:g} s")


async def run(report: Report, quick: bool) -> None:
    rounds = 2 if quick else 7
    with tempfile.TemporaryDirectory() as directory:
        nvme = {"path": str(Path(directory, "nvme")), "capacity": 2 << 30}
        kvbm = {"host_bytes": HOST_BYTES, "nvme": nvme}
        with mesh(Path(directory, "tiers"), config(**kvbm)) as served:
            async with other_node(Path(tempfile.mkdtemp(dir=directory)), served) as other:
                tiers = Tiers(served, other)
                # In this order, for each is what the one before left behind.
                ways = (tiers.cold, tiers.device, tiers.host, tiers.nvme, tiers.network)
                result = await interleave({way.__name__: way for way in ways}, rounds)
        device = result["device"]["ttft_ms"]
        report.add(Cell("TTFT, cold", "ms", "lower", result["cold"]["ttft_ms"]))
        report.add(Cell("TTFT, device hit", "ms", "lower", device))
        for tier, goal in (("host", HOST_GOAL), ("nvme", None), ("network", None)):
            note = "limit: a device hit"
            ttft = result[tier]["ttft_ms"]
            report.add(Cell(f"TTFT, {tier} hit", "ms", "lower", ttft, limit=device, goal=goal, note=note))

        async def fresh(of: Mesh) -> dict[str, float]:
            return figures(await ask(of, fresh_prompt()))

        with (
            mesh(Path(directory, "with"), config(host_bytes=HOST_BYTES)) as with_store,
            mesh(Path(directory, "without"), config(enabled=False)) as without,
        ):
            result = await interleave(
                {"with": lambda: fresh(with_store), "without": lambda: fresh(without)}, 3 * rounds
            )
        for name, figure in (("TTFT, cold", "ttft_ms"), ("between tokens", "itl_ms")):
            report.add(
                Cell(
                    f"{name}, with offload",
                    "ms",
                    "lower",
                    result["with"][figure],
                    limit=result["without"][figure],
                    goal=SLOWED_GOAL,
                    note="limit: without KVBM",
                )
            )


if __name__ == "__main__":
    main(__file__, run)
