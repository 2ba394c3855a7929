"""The tiers within one process: what is stored is found, what is found is right, whoever dies or fails."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvmesh.core import TieredStore

BLOCK = 60_000
MIB = 1 << 20


def digest(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


def content(number: int) -> bytes:
    return np.random.default_rng(number).integers(0, 256, BLOCK, np.uint8).tobytes()


def open_store(path: Path, nvme_bytes: int = 64 * MIB, policy: str = "default") -> TieredStore:
    return TieredStore(4 * MIB, BLOCK, path / "nvme", nvme_bytes, policy=policy)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TieredStore]:
    with open_store(tmp_path) as store:
        yield store


def test_blocks_move_between_the_tiers(store: TieredStore) -> None:
    for number in range(200):
        assert store.put(digest(number), content(number))
    places = store.contains([digest(number) for number in range(201)])
    assert set(places[:200]) == {"host", "nvme"}
    assert places[200] is None
    out = np.empty(BLOCK, np.uint8)
    for number in range(200):
        assert store.get(digest(number), out) in ("host", "nvme")
        assert out.tobytes() == content(number)
    assert store.get(digest(200), out) is None
    stats = store.stats()
    flow = stats["flow"]
    assert flow["problem"] is None
    assert flow["shed"] == flow["failed"] == stats["host"]["corrupt"] == stats["nvme"]["corrupt"] == 0
    assert flow["promoted"] > 0
    assert flow["spilled"] == stats["nvme"]["stored"]
    assert sum(stats["host"]["evicted"].values()) == stats["host"]["evicted"]["room"] > 100


def test_pinned_blocks_stay_in_memory(store: TieredStore) -> None:
    for number in range(100):
        store.put(digest(number), content(number))
    pinned = [digest(number) for number in range(10)]
    assert all(store.pin(name) for name in pinned)
    assert not store.pin(digest(5000))
    for number in range(1000, 1200):
        store.put(digest(number), content(number))
    assert store.contains(pinned) == ["host"] * 10
    assert all(store.unpin(name) for name in pinned)
    assert not any(store.unpin(name) for name in pinned)
    assert store.stats()["host"]["blocks_in_use"] <= 64, "only what is being written below"


def test_what_does_not_fit_is_refused(tmp_path: Path, store: TieredStore) -> None:
    with pytest.raises(ValueError, match="nvme_path and nvme_bytes"):
        TieredStore(4 * MIB, BLOCK, tmp_path)
    with pytest.raises(ValueError, match="no eviction policy"):
        TieredStore(4 * MIB, BLOCK, policy="mru")
    with pytest.raises(ValueError, match="60000 bytes, not 3"):
        store.put(digest(1), b"abc")
    with pytest.raises(ValueError, match="32 bytes"):
        store.put(b"abc", content(1))
    with pytest.raises((ValueError, BufferError), match=r"written|writable"):
        store.get(digest(1), content(1))


@pytest.mark.parametrize("policy", ["default", "lru", "s3-fifo"])
def test_a_restart_finds_what_was_flushed(tmp_path: Path, policy: str) -> None:
    with open_store(tmp_path, policy=policy) as store:
        for number in range(40):
            assert store.put(digest(number), content(number))
        store.flush()
    with open_store(tmp_path, policy=policy) as store:
        assert store.contains([digest(number) for number in range(40)]) == ["nvme"] * 40
        assert store.stats()["flow"]["recovered"] == 40
    with TieredStore(4 * MIB, BLOCK - 8, tmp_path / "nvme", 64 * MIB) as other:
        assert other.contains([digest(1)]) == [None], "a block of another size is another block"
    # Larger by half: its slots are cut differently.
    with open_store(tmp_path, 96 * MIB) as store:
        assert store.stats()["nvme"]["blocks"] == 0
        assert store.put(digest(1), content(1))


WRITER = """
    import hashlib, sys
    import numpy as np
    from kvmesh.core import TieredStore
    path, number = sys.argv[1], int(sys.argv[2])
    block, flushed = 60_000, number
    store = TieredStore(4 << 20, block, path, 64 << 20)
    print("on", flush=True)
    while True:
        data = np.random.default_rng(number).integers(0, 256, block, np.uint8)
        assert store.put(hashlib.sha256(number.to_bytes(8, "little")).digest(), data)
        number += 1
        if number % 8 == 0:
            store.flush()
            print(number, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_blocks_and_all_that_were_flushed(tmp_path: Path) -> None:
    moments = random.Random(5)
    first, flushed = 0, set[int]()
    out = np.empty(BLOCK, np.uint8)
    for _ in range(15):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path / "nvme"), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "on\n"
            wanted = moments.randrange(1, 12)
            last = first
            for line in writer.stdout:
                last = int(line)
                wanted -= 1
                if wanted == 0:
                    break
            # In the middle of whatever it does now.
            for _ in range(moments.randrange(200_000)):
                pass
            writer.kill()
            rest = writer.stdout.read().split()
        last = int(rest[-1]) if rest else last
        flushed.update(range(first, last))
        with open_store(tmp_path) as store:
            assert store.stats()["flow"]["problem"] is None
            there = store.contains([digest(number) for number in range(last + 100)])
            assert all(there[number] == "nvme" for number in range(first, last)), "what was flushed is there"
            for number in range(first, last + 100):
                if there[number] is not None:
                    assert store.get(digest(number), out) == "nvme"
                    assert out.tobytes() == content(number)
            assert store.stats()["nvme"]["corrupt"] == 0
        first = last + 100
    assert len(flushed) > 200


FULL = """
    import hashlib, resource, sys, time
    import numpy as np
    from kvmesh.core import TieredStore
    block = 60_000
    store = TieredStore(4 << 20, block, sys.argv[1], 64 << 20)
    def put(numbers):
        for number in numbers:
            data = np.full(block, number % 256, np.uint8)
            store.put(hashlib.sha256(number.to_bytes(8, "little")).digest(), data)
    def until(out):
        for _ in range(3000):
            if (store.stats()["flow"]["problem"] is not None) == out:
                return store.stats()["flow"]
            time.sleep(0.01)
        raise SystemExit("no change")
    put(range(200))
    store.flush()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Files cannot grow or be written past the first page any more: as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    put(range(1000, 1200))
    print(until(True)["problem"])
    out = np.empty(block, np.uint8)
    # Memory goes on, once what was being written has been given up.
    for first in range(2000, 3000, 100):
        put(range(first, first + 100))
        late = [hashlib.sha256(number.to_bytes(8, "little")).digest() for number in range(first, first + 100)]
        if any(store.get(name, out) == "host" for name in late):
            break
        time.sleep(0.1)
    else:
        raise SystemExit("memory takes nothing")
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    flow = until(False)
    assert flow["outages"] == 1, flow
    assert flow["recovered"] > 50, flow
    put(range(3000, 3200))
    store.flush()
    for number in range(200):
        name = hashlib.sha256(number.to_bytes(8, "little")).digest()
        if store.get(name, out):
            assert (out == number % 256).all()
    print("back", store.stats()["nvme"]["corrupt"])
"""


def test_a_full_disk_takes_the_tier_out_until_there_is_room(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path / "nvme")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    problem, back = run.stdout.splitlines()
    assert str(tmp_path) in problem
    assert "File too large" in problem
    assert back == "back 0"


def test_a_disk_that_was_never_there_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "nvme").write_text("not a directory")
    with open_store(tmp_path) as store:
        assert "nvme" in (store.stats()["flow"]["problem"] or "")
        assert store.put(digest(1), content(1))
        assert store.contains([digest(1)]) == ["host"]
        with pytest.raises(OSError, match="is out"):
            store.flush()


def test_object_storage_is_shared_and_checked(tmp_path: Path) -> None:
    url = f"fs://{tmp_path}/objects"
    out = np.empty(BLOCK, np.uint8)
    with TieredStore(4 * MIB, BLOCK, remote=url, policy="lru") as first:
        for number in range(100):
            assert first.put(digest(number), content(number))
        first.flush()
        kept = first.stats()["objects"]
        assert (kept["problem"], kept["written"], kept["url"]) == (None, 100, url)
        assert sum(kept["skipped"].values()) == 0
    with TieredStore(4 * MIB, BLOCK, remote=url, policy="lru") as second:
        assert second.contains([digest(number) for number in range(101)]) == ["network"] * 100 + [None]
        for number in range(100):
            assert second.get(digest(number), out) == "network"
            assert out.tobytes() == content(number)
            assert second.get(digest(number), out) == "host"
        assert second.stats()["objects"]["recalled"] == 100
        for damaged in (tmp_path / "objects" / "kv1").rglob("*.none"):
            data = bytearray(damaged.read_bytes())
            data[len(data) // 2] ^= 1
            damaged.write_bytes(data)
    with TieredStore(4 * MIB, BLOCK, remote=url) as third:
        assert not any(third.get(digest(number), out) for number in range(100))
        assert third.stats()["network"]["corrupt"] == 100
    for wrong in ("nowhere", "s3://", "fs://relative"):
        with pytest.raises(ValueError, match=r"kvbm\.object\.url"):
            TieredStore(4 * MIB, BLOCK, remote=wrong)
