"""hash_tokens against hashlib and against SGLang's own functions."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
from array import array
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvmesh.core import HashChain, event_namespace_seed, hash_tokens, namespace_seed


def reference(tokens: list[int], page_size: int, seed: bytes = b"") -> list[int]:
    """The chain as its definition reads."""
    hashes, parent = [], seed
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = np.array(tokens[start : start + page_size], dtype="<u4").tobytes()
        parent = hashlib.sha256(parent + page).digest()
        hashes.append(int.from_bytes(parent[:8], "big"))
    return hashes


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return [random.Random(seed + n).randrange(2**32) for n in range(count)]


@pytest.mark.parametrize("page_size", [1, 2, 7, 8, 16, 32, 64, 100])
@pytest.mark.parametrize("seed", [b"", bytes(range(32))], ids=["no namespace", "namespace"])
def test_equals_hashlib(page_size: int, seed: bytes) -> None:
    tokens = random_tokens(333)
    hashes = hash_tokens(tokens, page_size, seed)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == reference(tokens, page_size, seed)
    assert len(hashes) == len(tokens) // page_size


def test_a_partial_page_and_an_empty_prompt_have_no_hash() -> None:
    assert hash_tokens([], 16).tolist() == []
    assert hash_tokens(list(range(15)), 16).tolist() == []
    assert hash_tokens(list(range(31)), 16).tolist() == reference(list(range(16)), 16)


@pytest.mark.parametrize(
    "make",
    [
        tuple,
        iter,
        lambda tokens: array("q", tokens),
        lambda tokens: array("I", tokens),
        lambda tokens: np.array(tokens, np.int64),
        lambda tokens: np.array(tokens, np.int32),
        lambda tokens: np.array(tokens, np.uint32),
        lambda tokens: np.array(tokens, np.uint64),
        lambda tokens: np.repeat(np.array(tokens, np.int64), 2)[::2],
        lambda tokens: memoryview(array("q", tokens)),
    ],
)
def test_every_form_of_tokens(make) -> None:
    tokens = [n * 1_000_003 % 200_000 for n in range(64)]
    assert hash_tokens(make(tokens), 16).tolist() == reference(tokens, 16)


@pytest.mark.parametrize(
    "tokens",
    [
        [-1],
        [2**32],
        [2**70],
        np.array([-1]),
        np.array([2**32]),
        np.array([2**63], np.uint64),
        np.zeros((2, 2), np.int64),
    ],
)
def test_tokens_out_of_range_are_a_value_error(tokens) -> None:
    with pytest.raises(ValueError, match=r"token ids|one dimension"):
        hash_tokens(tokens, 1)


@pytest.mark.parametrize("tokens", [["a"], [1.5], None, np.array([1.5]), [None]])
def test_tokens_of_other_types_are_a_type_error(tokens) -> None:
    with pytest.raises(TypeError):
        hash_tokens(tokens, 1)


def test_wrong_page_size_and_namespace() -> None:
    with pytest.raises(ValueError, match="page_size"):
        hash_tokens([1], 0)
    with pytest.raises((ValueError, OverflowError)):
        hash_tokens([1], -1)
    with pytest.raises(ValueError, match="32 bytes"):
        hash_tokens([1], 1, b"short")


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("seed", [b"", bytes(range(32))], ids=["no namespace", "namespace"])
def test_a_growing_chain_equals_the_whole(page_size: int, seed: bytes) -> None:
    tokens = random_tokens(200)
    chain = HashChain(page_size, seed)
    hashes: list[int] = []
    start = 0
    for count in (0, 1, 15, 1, 47, 5, 100, 31):
        hashes += chain.extend(tokens[start : start + count]).tolist()
        start += count
        assert len(chain) == start
        assert hashes == hash_tokens(tokens[:start], page_size, seed).tolist()
    with pytest.raises(ValueError, match="token ids"):
        chain.extend([1, -1])
    assert len(chain) == start
    with pytest.raises(ValueError, match="page_size"):
        HashChain(0)
    with pytest.raises(ValueError, match="32 bytes"):
        HashChain(16, b"short")


def test_threads_hash_at_the_same_time() -> None:
    tokens = np.arange(50_000, dtype=np.uint32)
    expected = hash_tokens(tokens, 16).tolist()
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: results.append(hash_tokens(tokens, 16).tolist())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


# -- SGLang --


@pytest.fixture(scope="module")
def sglang():
    """SGLang's functions; skips where it, or the compiler that its hash extension needs, is absent."""
    # It builds the extension with the ninja that is installed beside Python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    hashing = pytest.importorskip("sglang.srt.mem_cache.utils")
    try:
        hashing.get_hash_str([1], None, 1)
    except RuntimeError as error:
        pytest.skip(f"SGLang's hash extension cannot be built here: {error}")
    return hashing


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "namespace", [(None, None), (None, "tenant"), ("lora", None), ("lora", ""), ("", "é")]
)
def test_equals_sglangs_storage_keys(sglang, namespace) -> None:
    tokens = random_tokens(200)
    extra_key, cache_salt = namespace
    seed = sglang.storage_namespace_seed(extra_key, cache_salt)
    expected = sglang.get_hash_str(tokens, seed, page_size=16)[: len(tokens) // 16]
    assert namespace_seed(extra_key, cache_salt).hex() == (seed or "")
    ours = hash_tokens(tokens, 16, namespace_seed(extra_key, cache_salt))
    assert ours.view(np.int64).tolist() == [sglang.hash_str_to_int64(key) for key in expected]


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("cache_salt", [None, "", "tenant"])
def test_equals_sglangs_event_hashes(sglang, cache_salt) -> None:
    """The hashes a radix node's KV events carry, from SGLang's own function."""

    class Key(list):
        """A radix key as far as hashing reads it."""

    tokens = random_tokens(64)
    key = Key(tokens)
    vars(key).update(extra_key=None, cache_salt=cache_salt)
    node = SimpleNamespace(key=key, parent=None, hash_value=None, event_hash_value=None)
    keys = sglang.compute_node_event_hash_values(node, 16)
    ours = hash_tokens(tokens, 16, event_namespace_seed(cache_salt))
    assert ours.view(np.int64).tolist() == [sglang.hash_str_to_int64(key) for key in keys]
