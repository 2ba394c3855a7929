"""What keeps the blocks of different requests apart, beside their tokens."""

from __future__ import annotations

from functools import lru_cache

from kvmesh.core import namespace_seed


# Asked for every request, and most have the same.
@lru_cache(1024)
def block_salt(cache_salt: str, adapter: str) -> str:
    """Under which a request's blocks are named on every tier; empty: by their tokens alone.

    Adapters change what is cached of the same tokens. Engines and whoever hashes a prompt say it alike.
    """
    return "/".join(part for part in (cache_salt, f"adapter:{adapter}" if adapter else "") if part)


@lru_cache(1024)
def chain_seed(salt: str) -> bytes:
    """What the names of blocks under a salt begin from: 32 bytes, or none without a salt."""
    return namespace_seed(cache_salt=salt) if salt else b""
