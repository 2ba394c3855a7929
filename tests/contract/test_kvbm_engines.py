"""A store as engines use it, by shared memory and its control channel; also where either side dies."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fixtures.kvbm import MIB, NAMESPACE, Kvbm, Pool, chain
from fixtures.waiting import eventually
from kvmesh.core import CorruptBlockError, Pages, StoreClient, StoreServer, page_digests


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StoreServer]:
    server = StoreServer(str(tmp_path / "kvbm.sock"), 2 * MIB, str(tmp_path))
    yield server
    server.stop()


def test_tenants_have_shares_where_weights_are_given(tmp_path: Path) -> None:
    path, size = str(tmp_path / "kvbm.sock"), 2 * MIB
    with pytest.raises(ValueError, match=r"acme.*kvbm\.tenant_weights"):
        StoreServer(path, size, str(tmp_path), tenant_weights={"acme": 0.0})
    server = StoreServer(path, size, str(tmp_path), "lru", tenant_weights={"acme": 3.0})
    pool = Pool(8, 1)
    client = StoreClient(path, **NAMESPACE, engine=1, timeout_s=5)
    client.connect()
    full = set()
    for number in range(40):
        for tenant, first in (("acme", 0), ("rival", 1_000_000)):
            blocks = chain(8, first + 100 * number)
            full.add(client.offload(None, blocks, pool.pages, list(range(8)), tenant)[2])
    held = server.tenant_bytes()
    assert full == {0}
    assert held["acme"] > 2 * held["rival"] > 0
    client.close()
    server.stop()


async def test_a_killed_store_leaves_no_memory_behind_and_its_engines_find_the_next(kvbm: Kvbm) -> None:
    pool, other, client = Pool(4, 1), Pool(4, 2), kvbm.client()
    blocks = chain(4)
    client.offload(None, blocks, pool.pages, [0, 1, 2, 3])
    lease = client.lease(blocks)
    assert lease is not None
    kvbm.end(signal.SIGKILL)
    assert {path.name for path in kvbm.home.iterdir()} == {"kvbm.sock"}, "the arena has no name"
    await eventually(lambda: not client.connected)
    lease.load(other.pages, [0, 1, 2, 3], 0, 4)
    assert all(np.array_equal(a, b) for a, b in zip(pool.buffers, other.buffers, strict=True))
    with pytest.raises(ConnectionError):
        client.lookup(blocks)
    await kvbm.start()
    client.connect()
    assert client.lookup(blocks) == 0
    assert client.offload(None, blocks, pool.pages, [0, 1, 2, 3]) == (4, 0, 0)
    assert kvbm.end() == 0
    assert not list(kvbm.home.iterdir())


async def test_a_stopped_store_costs_its_engine_one_timeout(kvbm: Kvbm) -> None:
    client = kvbm.client(timeout_s=0.05)
    assert kvbm.process is not None
    threads = Path(f"/proc/{kvbm.process.pid}/task")

    def stopped() -> bool:
        # The signal is sent at once, and each thread stops when it comes to it.
        states = [(thread / "stat").read_text().rpartition(")")[2].split()[0] for thread in threads.iterdir()]
        return set(states) == {"T"}

    kvbm.process.send_signal(signal.SIGSTOP)
    await eventually(stopped)
    with pytest.raises(ConnectionError, match="in time"):
        client.lookup(chain(1))
    for _ in range(100):
        # At once: the connection is gone, and nobody waits for an answer again.
        with pytest.raises(ConnectionError, match="not connected"):
            client.lookup(chain(1))
    kvbm.process.send_signal(signal.SIGCONT)

    def connected() -> bool:
        # The store may need longer than the client's 50 ms to come back.
        try:
            client.connect()
            return client.lookup(chain(1)) == 0
        except ConnectionError:
            return False

    await eventually(connected, 10)


ENGINE = """
    import os, sys, numpy as np
    from kvmesh.core import Pages, StoreClient, page_digests
    socket, seed, pages = sys.argv[1], int(sys.argv[2]), 64
    segments = [4096] * 4
    buffers = [np.full((pages, 4096), seed, np.uint8) for _ in segments]
    view = Pages(buffers, [b.ctypes.data for b in buffers], segments, segments, pages)
    client = StoreClient(socket, model="m", revision="1", dtype="float32", layout="nhd", rank=0, ranks=1,
                         segments=segments, engine=os.getpid(), timeout_s=5)
    client.connect()
    print("on", flush=True)
    step = 0
    while True:
        digests = page_digests(list(range(step, step + pages)), 1)
        client.offload(None, digests, view, list(range(pages)))
        lease = client.lease(digests)
        step += 1000
"""


async def test_engines_killed_at_any_moment_leave_nothing_and_nothing_torn(
    server: StoreServer, tmp_path: Path
) -> None:
    socket = str(tmp_path / "kvbm.sock")
    for attempt in range(6):
        engine = await asyncio.create_subprocess_exec(
            sys.executable, "-c", textwrap.dedent(ENGINE), socket, str(attempt + 1), stdout=subprocess.PIPE
        )
        assert engine.stdout is not None
        await engine.stdout.readline()
        await asyncio.sleep(0.003 * attempt)
        engine.kill()
        await engine.wait()
        await eventually(lambda: server.engines == 0 and server.stats()["blocks_in_use"] == 0)
        # Whatever is registered is whole: every page of one value, the killed engine's.
        pool = Pool(64, 0)
        client = StoreClient(socket, **NAMESPACE, engine=1, timeout_s=5)
        client.connect()
        for step in range(0, 200_000, 1000):
            digests = page_digests(list(range(step, step + 64)), 1)
            found = client.lookup(digests)
            lease = client.lease(digests[: 32 * found]) if found else None
            if lease is not None:
                lease.load(pool.pages, list(range(found)), 0, 4)
                loaded = np.concatenate([buffer[:found] for buffer in pool.buffers], axis=1)
                assert all(len(set(page.tolist())) == 1 for page in loaded)
                lease.release()
        client.close()
        await eventually(lambda: server.stats()["blocks_in_use"] == 0)
    assert server.stats()["loaded"] > 0
    assert server.stats()["corrupt"] == 0
    server.flush()
    assert server.stats()["used_bytes"] == 0


def test_pages_that_do_not_fit_are_refused(server: StoreServer, tmp_path: Path) -> None:
    client = StoreClient(str(tmp_path / "kvbm.sock"), **NAMESPACE, engine=1, timeout_s=5)
    client.connect()
    pool = Pool(4, 1)
    for digests, ids in ((chain(2), [0]), (chain(1), [4]), (b"short", [0])):
        with pytest.raises(ValueError, match=r"page|digest"):
            client.offload(None, digests, pool.pages, ids)
    other = Pages([pool.buffers], [pool.buffers[0].ctypes.data], [4096], [4096], 4)
    with pytest.raises(ValueError, match="segments"):
        client.offload(None, chain(1), other, [0])
    assert client.offload(None, chain(1), pool.pages, [0]) == (1, 0, 0)
    lease = client.lease(chain(1))
    assert lease is not None
    assert len(lease) == 1
    lease.release()
    lease.release()
    with pytest.raises(ValueError, match="released"):
        lease.load(pool.pages, [0], 0, 4)
    assert issubclass(CorruptBlockError, Exception)
