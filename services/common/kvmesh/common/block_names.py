"""What keeps the blocks of different requests apart, beside their tokens."""

from __future__ import annotations

import re
from functools import lru_cache

from kvmesh.core import namespace_seed

# A model's salt may come before it, an adapter behind it.
_TENANT = re.compile(r"(?:^|/)tenant:(.+?)(?:/adapter:.*)?$")


def cache_salt_of(model_salt: str, tenant: str) -> str:
    """What keeps a tenant's blocks apart, and a model's; empty for nobody's of a model that has none."""
    return "/".join(part for part in (model_salt, f"tenant:{tenant}" if tenant else "") if part)


def tenant_of_salt(salt: str) -> str:
    """Whose blocks of this salt are; empty: nobody's."""
    found = _TENANT.search(salt)
    return found[1] if found else ""


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
