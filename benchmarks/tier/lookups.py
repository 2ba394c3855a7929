"""How long a scheduler waits for an answer about a long prompt: a look-up as the engine's linker makes it."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from tier.memory import names

import harness  # noqa: F401 - makes the tests' fixtures importable
from fixtures.kvbm import Kvbm
from kvmesh.core import Pages, StoreClient

PAGES = 512
PAGE_BYTES = 4096
# In how long the engine computes a block: what is elsewhere would be brought, if anything were.
PER_BLOCK_S = 0.001
PATIENCE_S = 60.0


async def microseconds(home: Path, times: int) -> tuple[float, float]:
    """The median and the 99th percentile of looking up `PAGES` pages that a store's process has.

    From SGLang's page hashes to the answer.
    """
    store = Kvbm(Path(tempfile.mkdtemp(dir=home)))
    await store.start()
    try:
        client = StoreClient(
            store.socket,
            model="bench",
            revision="1",
            dtype="bytes",
            layout="whole",
            rank=0,
            ranks=1,
            segments=[PAGE_BYTES],
            engine=os.getpid(),
            timeout_s=PATIENCE_S,
        )
        client.connect()
        blocks = np.zeros((PAGES, PAGE_BYTES), np.uint8)
        pages = Pages([blocks], [blocks.ctypes.data], [PAGE_BYTES], [PAGE_BYTES], PAGES)
        digests = names(0, PAGES)
        stored = client.offload(None, b"".join(digests), pages, list(range(PAGES)))
        if stored != (PAGES, 0, 0):
            raise RuntimeError(f"stored, there, without room: {stored}")
        keys = [digest.hex() for digest in digests]
        taken = sorted(_look_up(client, keys) for _ in range(times))
        client.close()
    finally:
        store.end()
    return 1e6 * median(taken), 1e6 * taken[len(taken) * 99 // 100]


def _look_up(client: StoreClient, keys: list[str]) -> float:
    began = time.perf_counter()
    found, _ = client.lookup_for(bytes.fromhex("".join(keys)), PER_BLOCK_S)
    taken = time.perf_counter() - began
    if found != len(keys):
        raise RuntimeError(f"{found} of {len(keys)} pages found")
    return taken
