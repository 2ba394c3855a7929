"""The Policy contract for policies from outside: candidates with predicted costs in, their own costs out.

kvmesh's own policies are Rust (`kvmesh-select`). One of another package is a class under the entry point
group `kvmesh.router.policies`; it is asked for each request that names it, on the router's event loop, so it
should answer within some microseconds. A policy judges; it places nothing and sees no clock or network, so
that a decision can be made again from what was logged. `tests/contract/test_router_policies.py` runs every
policy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar, NamedTuple


class CachedTokens(NamedTuple):
    """Prompt tokens found in each tier, exclusive of faster tiers."""

    device: int = 0
    host: int = 0
    nvme: int = 0
    network: int = 0


NOTHING_CACHED = CachedTokens()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A possible placement: an aggregated worker (`prefill` is `decode`), or a prefill and a decode one."""

    prefill: str
    decode: str
    # Live requests there; of a pair, on its prefill worker.
    requests: int = 0
    # Of the prompt, where it would be computed.
    cached: CachedTokens = NOTHING_CACHED
    # Predicted milliseconds by name (`kvmesh.core.TERMS`); `kv` takes their sum.
    terms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """What a policy may know of a request. Never the prompt."""

    prompt_tokens: int = 0
    # Hashes of the names; 0 for none.
    session: int = 0
    tenant: int = 0
    priority: int = 0


class Policy(ABC):
    """Judges placements. One instance serves all requests of a router, one at a time."""

    # The name in configuration and requests: lowercase, hyphens.
    name: ClassVar[str]

    def __init__(self, random: Random) -> None:
        """`random` is the only source of chance, so that a seed repeats every choice."""
        self._random = random

    @abstractmethod
    def costs(self, request: Request, candidates: Sequence[Candidate]) -> list[float]:
        """The finite cost of each candidate, in order; the lowest wins, chance decides between equal ones.

        Of a split placement the decode worker is chosen first: it is asked for candidates that are decode
        workers alone, then for every prefill worker with the one that won.
        """
