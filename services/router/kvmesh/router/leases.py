"""The leases that are out: what is reported of them, and how they end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from kvmesh.common.metrics import RouterMetrics
from kvmesh.core import Placed, Refused
from kvmesh.router.decisions import Decision
from kvmesh.router.model import Model
from kvmesh.v1.router_pb2 import LeaseReport

# Leases whose holder's stream broke live on for so long without a report; holders report every second.
ORPHANED_S = 5.0

# Carries out what the reports of a model's leases brought about, begun at that `time.perf_counter`.
Settle = Callable[[Model, list[Placed | Refused], float], None]


@dataclass(slots=True)
class Live:
    """A lease. Its decision is there until the first token."""

    model: Model
    placed_ms: float
    decision: Decision | None
    # When it was last reported on, or placed.
    heard_ms: float


class Leases:
    """Belongs to one event loop; no call blocks. `now` is in milliseconds and never falls."""

    def __init__(self, now: Callable[[], float], settle: Settle, metrics: RouterMetrics) -> None:
        self._now = now
        self._settle = settle
        self._metrics = metrics
        self._live: dict[int, Live] = {}

    def add(self, lease: int, model: Model, decision: Decision) -> None:
        """A placement took it out."""
        now = self._now()
        self._live[lease] = Live(model, now, decision, now)

    def expired(self, leases: Collection[int]) -> None:
        """The selector has reclaimed them."""
        for lease in leases:
            self._live.pop(lease, None)
        if leases:
            self._metrics.leases_ended.labels("expired").inc(len(leases))

    def report(self, reports: Iterable[LeaseReport]) -> list[int]:
        """Account for how leases fare; the ids of those not held here."""
        unknown = [report.lease_id for report in reports if not self._report(report)]
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
                self._metrics.leases_ended.labels("orphaned").inc()
                del self._live[lease]
                freed = live.model.selector.end(self._now(), lease)
                self._settle(live.model, freed or [], time.perf_counter())

    def _report(self, report: LeaseReport) -> bool:
        live = self._live.get(report.lease_id)
        if live is None:
            return False
        began = time.perf_counter()
        now, selector = self._now(), live.model.selector
        live.heard_ms = now
        outcomes = selector.progress(
            now,
            report.lease_id,
            prefilled=report.prefill_done,
            output_tokens=report.output_tokens,
            transfer_ms=report.transfer_ms,
        )
        if live.decision is not None:
            self._learn(live, live.decision, report, now)
        if report.ended:
            freed = selector.end(now, report.lease_id)
            outcomes = (outcomes or []) + (freed or [])
            del self._live[report.lease_id]
            self._metrics.leases_ended.labels("reported").inc()
        if outcomes is None:
            del self._live[report.lease_id]
            return False
        if outcomes or selector.held:
            self._settle(live.model, outcomes, began)
        return True

    def _learn(self, live: Live, decision: Decision, report: LeaseReport, now: float) -> None:
        """How far the predicted time to the first token was off."""
        placed = decision.placed
        split = placed.prefill != placed.decode
        if report.output_tokens or (report.prefill_done and not split):
            live.decision = None
            decision.actual_ttft_ms = actual = now - live.placed_ms
            self._metrics.ttft_actual.inc(actual / 1000)
            self._metrics.ttft_predicted.inc(placed.ttft_ms / 1000)
            self._metrics.ttft_error.observe(abs(actual - placed.ttft_ms) / 1000)
