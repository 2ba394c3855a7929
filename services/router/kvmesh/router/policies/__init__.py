"""Policies by name: kvmesh's own, and those that other packages offer under `kvmesh.router.policies`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from random import Random
from typing import TYPE_CHECKING

import structlog

from kvmesh.common.errors import invalid
from kvmesh.core import POLICIES, TERMS
from kvmesh.router.policies.contract import CachedTokens, Candidate, Policy, Request

if TYPE_CHECKING:
    from kvmesh.core import Judge

log = structlog.get_logger()

ENTRY_POINT_GROUP = "kvmesh.router.policies"


class Policies:
    """The policies of one router; external ones are made when first named, and kept."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._made: dict[str, Policy] = {}
        self._external: dict[str, EntryPoint] = {
            entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)
        }

    def names(self) -> list[str]:
        return sorted({*POLICIES, *self._external})

    def check(self, name: str) -> None:
        """Raises KvmeshError(INVALID_ARGUMENT) with the nearest name when there is no such policy."""
        if self.is_external(name):
            self.external(name)

    def is_external(self, name: str) -> bool:
        """Whether a name is none of kvmesh's own."""
        return name not in POLICIES

    def external(self, name: str) -> Policy:
        """A policy from outside. Raises as `check` does."""
        policy = self._made.get(name)
        if policy is None:
            policy = self._made[name] = self._class_of(name)(self._random)
        return policy

    def _class_of(self, name: str) -> type[Policy]:
        if name not in self._external:
            near = difflib.get_close_matches(name, self.names(), n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(self.names())}"
            raise invalid(f"unknown policy `{name}`; {hint}", param="policy")
        loaded = self._external[name].load()
        if not (isinstance(loaded, type) and issubclass(loaded, Policy)):
            raise invalid(f"policy `{name}` ({self._external[name].value}) is not a Policy", param="policy")
        return loaded


def judge(policy: Policy, worker_name: Callable[[int], str]) -> Judge:
    """An external policy as a Selector asks it. One that fails is logged, and `kv` judges in its place."""

    def asked(
        request: tuple[int, int, int, int],
        candidates: list[tuple[int, int, int, tuple[int, int, int, int], tuple[float, ...]]],
        partners: bool,
    ) -> list[float]:
        try:
            return policy.costs(
                Request(*request),
                [
                    Candidate(
                        prefill=worker_name(prefill),
                        decode=worker_name(decode),
                        requests=requests,
                        cached=CachedTokens(*cached),
                        terms=dict(zip(TERMS, terms, strict=True)),
                    )
                    for prefill, decode, requests, cached, terms in candidates
                ],
            )
        except Exception:
            log.exception("policy failed; kv judges instead", policy=policy.name)
            return []

    return asked
