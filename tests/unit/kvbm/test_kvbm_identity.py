"""What makes two blocks the same block: their digests and their namespace."""

from __future__ import annotations

import hashlib
import json
import struct
from array import array
from pathlib import Path
from typing import Any

import pytest

from kvmesh.core import hash_tokens, page_digests

# The first test with SGLang imports it.
pytestmark = pytest.mark.timeout(300)


def reference(tokens: list[int], page: int, parent: bytes = b"") -> list[bytes]:
    chain = []
    for start in range(0, len(tokens) // page * page, page):
        parent = hashlib.sha256(parent + struct.pack(f"<{page}I", *tokens[start : start + page])).digest()
        chain.append(parent)
    return chain


def never(*_: object) -> str:
    raise AssertionError("SGLang's own hash was asked")


@pytest.mark.parametrize("page", [1, 16, 61])
@pytest.mark.parametrize("parent", [b"", bytes(range(32))])
def test_page_digests_are_the_sha256_chain(page: int, parent: bytes) -> None:
    tokens = [(i * 7919) % 128_000 for i in range(500)]
    chain = reference(tokens, page, parent)
    assert page_digests(tokens, page, parent) == b"".join(chain)
    assert [int.from_bytes(digest[:8]) for digest in chain] == hash_tokens(tokens, page, parent).tolist()


@pytest.mark.parametrize("typecode", ["q", "I"])
def test_sglangs_keys_are_these_digests(typecode: str, sg: Any) -> None:
    hash_pages = sg.page_hashes.hash_pages
    tokens = array(typecode, [(i * 31) % 5000 for i in range(64)])
    chain = reference(tokens.tolist(), 16)
    assert hash_pages(never, tokens, None, 16) == [digest.hex() for digest in chain]
    assert hash_pages(never, tokens[16:], chain[0], 16) == [digest.hex() for digest in chain[1:]]
    assert hash_pages(never, tokens[:16], None) == chain[0].hex()


def test_what_is_not_whole_pages_is_left_to_sglang(sg: Any) -> None:
    hash_pages = sg.page_hashes.hash_pages
    assert hash_pages(lambda *_: "its own", array("q", range(20)), None, 16) == "its own"
    assert hash_pages(lambda *_: "its own", [(1, 2), (2, 3)], None, 2) == "its own"


def write_model(directory: Path, weights: bytes) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    half = len(weights) // 2
    offsets = {"a": [0, half], "b": [half, len(weights)]}
    header = json.dumps(
        {k: {"dtype": "U8", "shape": [1], "data_offsets": v} for k, v in offsets.items()}
    ).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)
    return directory


def test_a_fingerprint_is_of_the_weights_not_of_their_place(tmp_path: Path, sg: Any) -> None:
    fingerprint = sg.namespace.fingerprint
    weights = bytes(range(256)) * 200
    one = fingerprint(write_model(tmp_path / "one", weights))
    assert fingerprint(write_model(tmp_path / "two", weights)) == one
    tuned = bytearray(weights)
    # One tensor of two.
    tuned[len(weights) * 3 // 4] ^= 1
    assert fingerprint(write_model(tmp_path / "tuned", bytes(tuned))) != one
    other = write_model(tmp_path / "other", weights)
    (other / "config.json").write_text('{"rope_theta": 1}')
    assert fingerprint(other) != one


def test_a_model_without_weights_has_no_fingerprint(tmp_path: Path, sg: Any) -> None:
    with pytest.raises(sg.device_pages.UnsupportedPool, match="cannot tell which weights"):
        sg.namespace.fingerprint(tmp_path)
