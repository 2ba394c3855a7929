"""The last decisions, by request, for those who ask why."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from kvmesh.core import TERMS, Placed
from kvmesh.router.model import Model
from kvmesh.v1 import common_pb2, router_pb2

# Decisions of one request: it is placed again where a worker failed.
MOST_OF_ONE = 8


@dataclass(slots=True)
class Decision:
    """One placement; the selector's own record of it is kept as it is, and read when asked for."""

    request_id: str
    model: str
    # Seconds since the epoch.
    at: float
    prompt_tokens: int
    placed: Placed
    worker_name: Callable[[int], str]
    # Real milliseconds from the placement to the first token; 0 until known.
    actual_ttft_ms: float = 0.0

    @classmethod
    def of(cls, request: router_pb2.RouteRequest, model: Model, placed: Placed) -> Decision:
        """Made now."""
        return cls(
            request.request_id, model.name, time.time(), request.prompt_tokens, placed, model.worker_name
        )

    def to_proto(self) -> router_pb2.Decision:
        placed = self.placed
        winner = router_pb2.Candidate(
            **self._pair(placed.prefill, placed.decode),
            cached=cached_proto(placed.cached),
            cost=sum(placed.terms),
            terms=dict(zip(TERMS, placed.terms, strict=True)),
        )
        return router_pb2.Decision(
            request_id=self.request_id,
            model=self.model,
            policy=placed.policy,
            at=self.at,
            held_ms=placed.held_ms,
            prompt_tokens=self.prompt_tokens,
            winner=winner,
            candidates=self.candidates(),
            predicted_ttft_ms=placed.ttft_ms,
            actual_ttft_ms=self.actual_ttft_ms,
            shadows=[
                router_pb2.ShadowChoice(
                    **self._pair(prefill, decode),
                    policy=policy,
                    cost=cost,
                    ttft_ms=ttft,
                    live_cost=live_cost,
                    live_ttft_ms=live_ttft,
                )
                for policy, prefill, decode, cost, ttft, live_cost, live_ttft in placed.shadows()
            ],
        )

    def candidates(self) -> list[router_pb2.Candidate]:
        """What it was chosen from, the cheapest first: all where the request asked, else some."""
        return [
            router_pb2.Candidate(
                **self._pair(prefill, decode),
                cached=cached_proto(cached),
                cost=cost,
                terms=dict(zip(TERMS, terms, strict=True)),
            )
            for prefill, decode, cached, cost, terms in self.placed.candidates()
        ]

    def _pair(self, prefill: int, decode: int) -> dict[str, str]:
        return {
            "prefill_id": self.worker_name(prefill) if prefill != decode else "",
            "decode_id": self.worker_name(decode),
        }


class Decisions:
    """A bounded log in memory: the decisions of the last `most` requests that have an id."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._by_request: OrderedDict[str, list[Decision]] = OrderedDict()

    def add(self, decision: Decision) -> None:
        if not decision.request_id or not self._most:
            return
        of_one = self._by_request.setdefault(decision.request_id, [])
        of_one.append(decision)
        del of_one[:-MOST_OF_ONE]
        self._by_request.move_to_end(decision.request_id)
        if len(self._by_request) > self._most:
            self._by_request.popitem(last=False)

    def of(self, request_id: str) -> list[Decision]:
        """The placements of a request, the latest last; empty when none is known (any more)."""
        return self._by_request.get(request_id, [])


def cached_proto(cached: tuple[int, int, int, int]) -> common_pb2.CachedTokens:
    device, host, nvme, network = cached
    return common_pb2.CachedTokens(device=device, host=host, nvme=nvme, network=network)
