"""SGLang's page hashes by kvmesh's Rust, so that an engine needs no C++ compiler to cache outside its device.

SGLang compiles its own when it first needs them. Both give the same digests; `tests/unit/kvbm` holds them
side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.mem_cache.cpp_utils.native_hash import _native_hash_input

from kvmesh.core import page_digests

TARGET = "sglang.srt.mem_cache.utils.get_native_hash"
_HEX = 64


def hash_pages(
    original: Callable[..., str | list[str]],
    token_ids: Any,
    prior_digest: bytes | None,
    page_size: int | None = None,
) -> str | list[str]:
    """Around SGLang's `get_native_hash`: every page's digest in hexadecimal, or one of all tokens."""
    tokens, count, width, is_bigram = _native_hash_input(token_ids)
    size = page_size or count
    if is_bigram or width != 1 or not count or count % size:
        # Speculative decoding's pairs of tokens, and pages that are not whole, which nothing stores.
        return original(token_ids, prior_digest, page_size)
    digests = page_digests(tokens[:count], size, prior_digest or b"").hex()
    if page_size is None:
        return digests
    return [digests[start : start + _HEX] for start in range(0, len(digests), _HEX)]
