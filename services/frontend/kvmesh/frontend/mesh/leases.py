"""Tells the routers how their leases fare, many in one report.

A live lease is reported once a second, whether it moved or not, so a long request never expires; its first
token and its end are reported at once. A lease is reported to the router that gave it out; where that one is
lost, to another replica from then on. Reports that cannot be delivered are dropped: what they would have
freed, the router reclaims by itself.
"""

from __future__ import annotations

import asyncio
import math

from kvmesh.frontend.mesh.router_link import RouterLink
from kvmesh.frontend.mesh.routers import Routers
from kvmesh.v1.router_pb2 import Lease, LeaseReport

# Ends, finished prefills and first tokens wait this long for company.
_SOON_S = 0.01
# Between renewals, if the leases' time to live does not ask for more.
_RENEW_S = 1.0


class HeldLease:
    """One request's lease. `output_tokens` is the holder's to raise; it travels with the next report."""

    __slots__ = (
        "_ended",
        "_first_token",
        "_leases",
        "_prefill_done",
        "_transfer_ms",
        "id",
        "output_tokens",
        "router",
        "ttl_s",
    )

    def __init__(self, leases: Leases, lease: Lease, router: RouterLink) -> None:
        self._leases = leases
        # Whom it is reported to.
        self.router = router
        self._prefill_done = False
        self._first_token = False
        self._transfer_ms = 0.0
        self._ended = False
        self.id = lease.id
        self.ttl_s = lease.ttl_ms / 1000
        self.output_tokens = 0

    def prefill_done(self, transfer_ms: float = 0.0) -> None:
        """The prompt is computed; its KV was on the way for `transfer_ms` before that, 0 if that is not
        known."""
        # It may come just after the first token, and still go with it.
        self._transfer_ms = self._transfer_ms or transfer_ms
        if not self._prefill_done:
            self._prefill_done = True
            self._leases.report_soon(self)

    def first_token(self) -> None:
        """The answer has begun, so the prompt is computed, too."""
        if not self._first_token:
            self._first_token = True
            self._prefill_done = True
            self.output_tokens = max(self.output_tokens, 1)
            self._leases.report_soon(self)

    def end(self) -> None:
        """Free the lease; idempotent."""
        if not self._ended:
            self._ended = True
            self._leases.drop(self)

    def report(self) -> LeaseReport:
        return LeaseReport(
            lease_id=self.id,
            prefill_done=self._prefill_done,
            output_tokens=self.output_tokens,
            ended=self._ended,
            transfer_ms=self._transfer_ms,
        )


class Leases:
    """All leases a process holds. Belongs to one event loop; idle while it holds none."""

    def __init__(self, routers: Routers) -> None:
        self._routers = routers
        self._loop = asyncio.get_running_loop()
        routers.when_lost(self._on_lost)
        self._live: dict[int, HeldLease] = {}
        self._due: dict[int, HeldLease] = {}
        self._timer: asyncio.TimerHandle | None = None
        # Kept beside it: uvloop's handles of times past do not know theirs.
        self._timer_at = 0.0
        # Between renewals, as the shortest of the live leases asks for; and when the next is due.
        self._renew_s = _RENEW_S
        self._renew_at = math.inf

    def __len__(self) -> int:
        return len(self._live)

    def hold(self, lease: Lease, router: RouterLink) -> HeldLease:
        """`router` gave it out."""
        held = HeldLease(self, lease, router)
        if not self._live:
            self._renew_s, self._renew_at = _RENEW_S, math.inf
        self._live[held.id] = held
        self._renew_s = min(self._renew_s, held.ttl_s / 4)
        self._renew_in(self._renew_s)
        return held

    def report_soon(self, lease: HeldLease) -> None:
        self._due[lease.id] = lease
        self._wake_at(self._loop.time() + _SOON_S)

    def drop(self, lease: HeldLease) -> None:
        self._live.pop(lease.id, None)
        self.report_soon(lease)

    def close(self) -> None:
        """End all leases and report what is due."""
        for lease in list(self._live.values()):
            lease.end()
        self._report(self._due)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _renew_in(self, delay: float) -> None:
        self._renew_at = min(self._renew_at, self._loop.time() + delay)
        self._wake_at(self._renew_at)

    def _wake_at(self, at: float) -> None:
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._loop.time() < self._renew_at:
            self._report(self._due)
        else:
            self._report({**self._live, **self._due})
            self._renew_at = math.inf
        if self._live:
            self._renew_in(self._renew_s)

    def _report(self, due: dict[int, HeldLease]) -> None:
        self._due = {}
        by_router: dict[RouterLink, list[LeaseReport]] = {}
        for lease in due.values():
            lease.router = self._routers.reachable(lease.router)
            by_router.setdefault(lease.router, []).append(lease.report())
        for router, reports in by_router.items():
            router.report(reports)

    def _on_lost(self, router: RouterLink) -> None:
        """Its replicas end its leases, unless they hear soon that these are in use."""
        if any(lease.router is router for lease in self._live.values()):
            self._renew_in(_SOON_S)
