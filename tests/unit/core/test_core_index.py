"""PrefixIndex from Python: its meaning, its forms of input, its errors, and programs of another index."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from kvmesh.core import PrefixIndex

ROOT = Path(__file__).parents[3]
TRACES = Path(os.environ.get("KVMESH_TRACES", ROOT.parent / "shared" / "traces"))
PROGRAMS = TRACES / "index" / "radix_programs.jsonl"
TIERS = ("device", "host", "nvme", "network")


def test_an_engine_sees_its_device_its_nodes_tiers_and_the_network() -> None:
    index = PrefixIndex()
    near = index.add_engine("near", "node-a")
    far = index.add_engine("far", "node-b")
    nowhere = index.add_engine("nowhere")
    node_store = index.add_store("kvbm-a", "node-a")
    cluster = index.add_store("objects")
    prompt = list(range(100, 110))
    index.store(near, prompt[:2])
    index.store(node_store, prompt[2:4], prompt[1], "host")
    index.store(node_store, prompt[4:6], prompt[3], "nvme")
    index.store(cluster, prompt[6:8], prompt[5], "network")
    assert index.match(prompt) == {near: (2, 4, 6, 8)}
    # The network has the first blocks, too: now every engine sees them.
    index.store(cluster, prompt[:3], None, "network")
    assert index.match(prompt) == {near: (2, 4, 6, 8), far: (0, 0, 0, 3), nowhere: (0, 0, 0, 3)}
    index.store(far, prompt[:1])
    assert index.match(prompt)[far] == (1, 1, 1, 3)
    assert index.match([7, *prompt]) == {}
    assert index.match([]) == {}


def test_a_hole_shortens_and_a_restore_heals() -> None:
    index = PrefixIndex()
    engine = index.add_engine("engine")
    prompt = list(range(1, 201))
    index.store(engine, prompt[100:], prompt[99])  # before its parents
    assert index.match(prompt) == {}
    index.store(engine, prompt[:100])
    assert index.match(prompt) == {engine: (200,) * 4}
    index.remove(engine, [prompt[70], 999_999])
    assert index.match(prompt) == {engine: (70,) * 4}
    index.store(engine, [prompt[70]], 12345)  # a wrong parent changes nothing
    assert index.match(prompt) == {engine: (200,) * 4}


def test_digests_tell_sets_apart_and_not_orders() -> None:
    index = PrefixIndex()
    one, two = index.add_engine("one"), index.add_engine("two")
    rng = random.Random(1)
    hashes = [rng.getrandbits(64) for _ in range(500)]
    index.store(one, hashes)
    for hash in reversed(hashes):
        index.store(two, [hash])
    assert index.digest(one) == index.digest(two)
    assert index.digest(one, "device")[0] == 500
    index.remove(two, hashes[:1])
    assert index.digest(one) != index.digest(two)
    index.clear(one)
    index.clear(two, "device")
    assert index.digest(one) == index.digest(two) == (0, 0)


def test_blocks_are_those_of_the_holder_and_tier() -> None:
    index = PrefixIndex()
    one, two = index.add_engine("one", "node"), index.add_store("two", "node")
    index.store(one, [1, 2, 2**64 - 1])
    index.store(two, [2, 3], None, "host")
    index.remove(one, [1])
    assert index.blocks(one).dtype == np.uint64
    assert sorted(index.blocks(one).tolist()) == [2, 2**64 - 1]
    assert sorted(index.blocks(two, "host").tolist()) == [2, 3]
    assert index.blocks(two, "nvme").tolist() == []
    index.drop(one)
    with pytest.raises(KeyError):
        index.blocks(one)


def test_ids_end_with_their_holder() -> None:
    index = PrefixIndex()
    first = index.add_engine("engine")
    index.store(first, [1, 2, 3])
    index.drop(first)
    second = index.add_engine("engine")
    assert second != first
    assert index.match([1, 2, 3]) == {}
    for call in (
        lambda: index.store(first, [1]),
        lambda: index.remove(first, [1], "device"),
        lambda: index.clear(first),
        lambda: index.drop(first),
        lambda: index.digest(first, "device"),
    ):
        with pytest.raises(KeyError, match="no such holder"):
            call()


def test_four_thousand_holders_and_no_more() -> None:
    index = PrefixIndex()
    ids = [index.add_engine(f"engine-{n}", f"node-{n % 100}") for n in range(4096)]
    with pytest.raises(ValueError, match="too many holders"):
        index.add_engine("one-more")
    for id in ids:
        index.store(id, [1, 2])
    assert index.match([1, 2, 3]) == dict.fromkeys(ids, (2, 2, 2, 2))
    index.drop(ids[7])
    assert index.add_engine("one-more") not in ids


def test_misuse_is_refused() -> None:
    index = PrefixIndex()
    engine, node_store, cluster = (
        index.add_engine("engine", "node"),
        index.add_store("store", "node"),
        index.add_store("cluster"),
    )
    with pytest.raises(ValueError, match="exists"):
        index.add_store("engine")
    for id, tier in ((engine, "host"), (node_store, "device"), (cluster, "nvme"), (engine, "disk")):
        with pytest.raises(ValueError, match=f"tier: {tier}"):
            index.store(id, [1], None, tier)
    with pytest.raises(TypeError):
        index.store(engine, ["a"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="64 bits"):
        index.store(engine, [2**64])
    with pytest.raises(ValueError, match="one dimension"):
        index.match(np.zeros((2, 2), np.uint64))
    assert index.stats()["held"] == 0


def test_lists_and_arrays_signed_and_not_name_the_same_blocks() -> None:
    index = PrefixIndex()
    engine = index.add_engine("engine")
    hashes = np.array([1, 2**63, 2**64 - 1], np.uint64)
    index.store(engine, hashes)
    expected = {engine: (3, 3, 3, 3)}
    for form in (
        hashes,
        hashes.view(np.int64),
        hashes.tolist(),
        hashes.view(np.int64).tolist(),
        tuple(hashes),
    ):
        assert index.match(form) == expected
    assert index.stats()["blocks"] == 3


def test_match_into_agrees_and_needs_room() -> None:
    index = PrefixIndex()
    ids = [index.add_engine(f"engine-{n}") for n in range(5)]
    for n, id in enumerate(ids):
        index.store(id, range(10 * n + 10))  # type: ignore[arg-type]
    prompt = np.arange(100, dtype=np.uint64)
    engines, depths = np.zeros(8, np.uint32), np.zeros((8, 4), np.uint32)
    count = index.match_into(prompt, engines, depths)
    found = {int(id): tuple(map(int, row)) for id, row in zip(engines[:count], depths[:count], strict=True)}
    assert found == index.match(prompt)
    assert len(found) == 5
    with pytest.raises(ValueError, match="need 5 rows, got 2"):
        index.match_into(prompt, engines[:2].copy(), depths)
    with pytest.raises(ValueError, match="rows of 4"):
        index.match_into(prompt, engines, np.zeros((8, 3), np.uint32))


def test_the_cap_holds() -> None:
    index = PrefixIndex(200_000)
    engine = index.add_engine("engine")
    kept = list(range(1, 101))
    index.store(engine, kept)
    for n in range(1, 500):
        index.match(kept)
        index.store(engine, np.arange(100, dtype=np.uint64) + np.uint64(n * 1_000))
        assert index.stats()["bytes"] <= 200_000
    stats = index.stats()
    assert stats["max_bytes"] == 200_000
    assert stats["blocks"] + stats["forgotten"] == 500 * 100
    assert index.match(kept) == {engine: (100,) * 4}


def test_random_programs_against_sets() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        index = PrefixIndex()
        engine, store = index.add_engine("engine", "node"), index.add_store("store", "node")
        held: dict[str, set[int]] = {tier: set() for tier in TIERS}
        for _ in range(200):
            tier = rng.choice(TIERS)
            holder = engine if tier == "device" else store
            hashes = [rng.randrange(30) for _ in range(rng.randrange(12))]
            if rng.random() < 0.6:
                index.store(holder, hashes, rng.choice([None, 3]), tier)
                held[tier] |= set(hashes)
            else:
                index.remove(holder, hashes, tier)
                held[tier] -= set(hashes)
            prompt = [rng.randrange(30) for _ in range(10)]
            depths, visible = [], set()
            for tier in TIERS:
                visible |= held[tier]
                depths.append(next((n for n, hash in enumerate(prompt) if hash not in visible), len(prompt)))
            assert index.match(prompt) == ({engine: tuple(depths)} if depths[3] else {})


def test_a_batch_of_events() -> None:
    index = PrefixIndex()
    engine = index.add_engine("engine")
    # holder_id "engine"; one event, stored on the device (1 * 4 + 0), of three hashes
    batch = b"\x0a\x06engine" + b"\x3a\x01\x04" + b"\x42\x01\x03"
    hashes = b"".join(hash.to_bytes(8, "little") for hash in (1, 2, 3))
    index.apply(batch + b"\x4a\x18" + hashes)
    assert index.match([1, 2, 3, 4]) == {engine: (3, 3, 3, 3)}
    with pytest.raises(ValueError, match="counts"):
        index.apply(batch)
    with pytest.raises(ValueError, match="ends within"):
        index.apply(b"\x4a\x18" + hashes[:5])
    index.drop(engine)
    with pytest.raises(KeyError, match="engine"):
        index.apply(batch + b"\x4a\x18" + hashes)


def test_a_snapshot_keeps_holders_and_ids() -> None:
    index = PrefixIndex()
    engine = index.add_engine("engine", "node")
    store = index.add_store("store", "node")
    index.store(engine, [1, 2, 3])
    index.store(store, [1, 2, 3, 4], tier="host")
    saved = index.snapshot()
    copy = PrefixIndex.restore(saved)
    assert copy.match([1, 2, 3, 4, 5]) == {engine: (3, 4, 4, 4)}
    assert copy.digest(store, "host") == index.digest(store, "host")
    copy.remove(engine, [2])
    assert copy.match([1, 2, 3]) == {engine: (1, 3, 3, 3)}
    assert PrefixIndex.restore(saved, max_bytes=10).match([1]) == {}
    for damaged in (b"", saved[:-1], saved[:40] + bytes([saved[40] ^ 1]) + saved[41:]):
        with pytest.raises(ValueError, match="snapshot"):
            PrefixIndex.restore(damaged)


def test_matches_while_others_write() -> None:
    index = PrefixIndex()
    engine = index.add_engine("engine")
    prompt = np.arange(1, 129, dtype=np.uint64)
    index.store(engine, prompt[:64])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            index.store(engine, prompt[64:], 64)
            index.remove(engine, prompt[64:], "device")

    writer = threading.Thread(target=write)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    writer.start()
    try:
        depths = {index.match(prompt)[engine][0] for _ in range(2_000)}
    finally:
        stop.set()
        writer.join()
        sys.setswitchinterval(interval)
    assert depths <= {64, 128}


@pytest.mark.skipif(not PROGRAMS.exists(), reason=f"no {PROGRAMS}; set KVMESH_TRACES to the traces' folder")
def test_programs_with_another_indexs_answers() -> None:
    """50 event programs whose answers NVIDIA Dynamo's index gave, in our identity: a block's hash
    names its whole prefix, so it is chained from the programs' own token hashes."""

    def chain(parent: int, tokens_hash: int) -> int:
        message = parent.to_bytes(8, "big") + tokens_hash.to_bytes(8, "big")
        return int.from_bytes(hashlib.sha256(message).digest()[:8], "big")

    finds = 0
    for line in PROGRAMS.read_text().splitlines():
        index = PrefixIndex()
        ids: dict[tuple[int, int], int] = {}
        ours: dict[int, int] = {}
        program = json.loads(line)
        for op in program["ops"]:
            if op["op"] == "remove_worker":
                for worker in [worker for worker in ids if worker[0] == op["worker_id"]]:
                    index.drop(ids.pop(worker))
                continue
            if op["op"] == "find":
                hashes, parent = [], 0
                for tokens_hash in op["seq"]:
                    hashes.append(parent := chain(parent, tokens_hash))
                found = index.match(hashes)
                scores = [[*worker, found[id][0]] for worker, id in ids.items() if id in found]
                assert sorted(scores) == sorted(op["scores"]), f"seed {program['seed']}, find {finds}"
                finds += 1
                continue
            worker = (op["worker_id"], op["dp_rank"])
            if worker not in ids:
                ids[worker] = index.add_engine(f"{worker}")
            data = op["data"]
            if data == "cleared":
                index.clear(ids[worker])
            elif "stored" in data:
                parent_hash, hashes = data["stored"]["parent_hash"], []
                parent = 0 if parent_hash is None else ours[parent_hash]
                first = parent
                for block in data["stored"]["blocks"]:
                    parent = ours[block["block_hash"]] = chain(parent, block["tokens_hash"])
                    hashes.append(parent)
                index.store(ids[worker], hashes, first or None)
            else:
                index.remove(ids[worker], [ours[hash] for hash in data["removed"]["block_hashes"]])
    assert finds > 2_000
