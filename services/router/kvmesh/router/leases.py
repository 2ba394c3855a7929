"""The leases that are out: what is reported of them, and how they end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from kvmesh.common.metrics import RouterMetrics
from kvmesh.core import Placed, Refused
from kvmesh.router.decisions import Decision
from kvmesh.router.model import Model
from kvmesh.v1.router_pb2 import LeaseReport, RouteRequest, RouteResponse

# Leases whose holder's stream broke live on for so long without a report; holders report every second.
ORPHANED_S = 5.0

# Carries out what the reports of a model's leases brought about, begun at that `time.perf_counter`.
Settle = Callable[[Model, list[Placed | Refused], float], None]


@dataclass(slots=True)
class Live:
    """A lease of this router's own. Its decision is there until the first token, where it was made here."""

    model: Model
    prompt_tokens: int
    # For its hashes: None once the prompt is computed.
    request: RouteRequest | None
    # For the placement, and what was expected.
    response: RouteResponse
    decision: Decision | None
    placed_ms: float
    # When it was last reported on, or placed.
    heard_ms: float
    prefilled: bool = False
    output_tokens: int = 0
    # As reported with its computed prompt.
    transfer_ms: float = 0.0
    # Replicas that owned it before.
    takeovers: int = 0


class Others(Protocol):
    """The other replicas of this router, as far as its leases concern them."""

    def held(self) -> int:
        """Leases of theirs that selectors here hold."""
        ...

    def changed(self, lease: int, *, soon: bool) -> None:
        """A lease of this router's own began, moved, was renewed or ended; `soon`: decisions turn on it."""
        ...

    def expired(self, lease: int) -> None:
        """The selector has reclaimed a lease of another replica."""
        ...

    def report(self, report: LeaseReport) -> bool:
        """A report on a lease that is not this router's own; whether another one is known to own it."""
        ...


class Leases:
    """Belongs to one event loop; no call blocks. `now` is in milliseconds and never falls."""

    def __init__(self, now: Callable[[], float], settle: Settle, metrics: RouterMetrics) -> None:
        self._now = now
        self._settle = settle
        self._metrics = metrics
        self._live: dict[int, Live] = {}
        self._others: Others | None = None

    def tell(self, others: Others) -> None:
        """Let the other replicas know from now on."""
        self._others = others

    def __iter__(self) -> Iterator[int]:
        """This router's own."""
        return iter(self._live)

    def known(self) -> int:
        """Those that somebody will end: this router's own, and those of the other replicas."""
        return len(self._live) + (self._others.held() if self._others is not None else 0)

    def get(self, lease: int) -> Live | None:
        """One of this router's own."""
        return self._live.get(lease)

    def add(self, lease: int, live: Live) -> None:
        """It is this router's own from now on: placed here, or taken over from a replica that is gone."""
        self._live[lease] = live
        self._changed(lease, soon=True)

    def give_up(self, lease: int) -> None:
        """It is another replica's own from now on; the selector keeps it."""
        del self._live[lease]
        self._changed(lease, soon=True)

    def expired(self, leases: Collection[int]) -> None:
        """The selector has reclaimed them."""
        for lease in leases:
            if self._live.pop(lease, None) is not None:
                self._metrics.ended_by("expired").inc()
                self._changed(lease, soon=True)
            elif self._others is not None:
                self._others.expired(lease)

    def report(self, reports: Iterable[LeaseReport]) -> list[int]:
        """Account for how leases fare; the ids of those that no replica is known to hold."""
        began, now = time.perf_counter(), self._now()
        unknown: list[int] = []
        of_models: dict[Model, list[tuple[int, bool, int, float, bool]]] = {}
        for report in reports:
            lease = report.lease_id
            live = self._live.get(lease)
            if live is not None:
                of_models.setdefault(live.model, []).append(self._take(live, report, now))
            elif self._others is None or not self._others.report(report):
                unknown.append(lease)
        for model, said in of_models.items():
            # One call, so that what all of them free is given out at once.
            outcomes, gone = model.selector.report(now, said)
            unknown += [lease for lease in gone if self._live.pop(lease, None) is not None]
            if ended := sum(report[-1] for report in said):
                self._metrics.ended_by("reported").inc(ended)
            if outcomes or model.selector.held:
                self._settle(model, outcomes, began)
        if unknown:
            self._metrics.unknown_leases.inc(len(unknown))
        return unknown

    def end(self, lease: int) -> None:
        """End a lease whose placement nobody will use."""
        self.report([LeaseReport(lease_id=lease, ended=True)])

    def orphan(self, leases: Collection[int]) -> None:
        """Their holder cannot be heard: unless it is again soon, they end. They would expire, but until then
        their prompts keep workers busy that may have nothing to do."""
        left = [lease for lease in leases if lease in self._live]
        if left:
            asyncio.get_running_loop().call_later(ORPHANED_S, self._end_unheard, left, self._now())

    def _end_unheard(self, leases: list[int], since_ms: float) -> None:
        for lease in leases:
            live = self._live.get(lease)
            if live is not None and live.heard_ms <= since_ms:
                self._metrics.ended_by("orphaned").inc()
                del self._live[lease]
                freed = live.model.selector.end(self._now(), lease)
                self._changed(lease, soon=True)
                self._settle(live.model, freed or [], time.perf_counter())

    def _take(self, live: Live, report: LeaseReport, now: float) -> tuple[int, bool, int, float, bool]:
        """Take note of a report on one of this router's own; what the selector is to hear of it."""
        lease, transfer_ms = report.lease_id, report.transfer_ms
        prefilled, output_tokens, ended = report.prefill_done, report.output_tokens, report.ended
        live.heard_ms = now
        if live.decision is not None:
            self._learn(live, live.decision, prefilled, output_tokens, now)
        soon = ended
        if not live.prefilled and (prefilled or output_tokens):
            live.prefilled = soon = True
            live.request = None
            live.transfer_ms = transfer_ms
        if output_tokens > live.output_tokens:
            soon |= not live.output_tokens
            live.output_tokens = output_tokens
        if ended:
            del self._live[lease]
        self._changed(lease, soon=soon)
        return lease, prefilled, output_tokens, transfer_ms, ended

    def _changed(self, lease: int, *, soon: bool) -> None:
        if self._others is not None:
            self._others.changed(lease, soon=soon)

    def _learn(self, live: Live, decision: Decision, prefilled: bool, output_tokens: int, now: float) -> None:
        """How far the predicted time to the first token was off."""
        placed = decision.placed
        split = placed.prefill != placed.decode
        if output_tokens or (prefilled and not split):
            live.decision = None
            decision.actual_ttft_ms = actual = now - live.placed_ms
            self._metrics.ttft_actual.inc(actual / 1000)
            self._metrics.ttft_predicted.inc(placed.ttft_ms / 1000)
            self._metrics.ttft_error.observe(abs(actual - placed.ttft_ms) / 1000)
