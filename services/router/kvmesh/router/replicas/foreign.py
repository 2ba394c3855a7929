"""The leases of other replicas, as the selectors here count with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvmesh.router.leases import Leases, Live, Settle
from kvmesh.router.model import Model
from kvmesh.v1.replicas_pb2 import LeaseProgress, ToldLease
from kvmesh.v1.router_pb2 import Expectation, LeaseReport, RouteRequest, RouteResponse


@dataclass(slots=True)
class Held:
    """One of them. `told` is kept up to date."""

    replica: str
    told: ToldLease
    # Whose selector holds it; None while the model is not known here.
    model: Model | None
    # Whether somebody reports on it here; they are who it lives for, should its owner be gone.
    heard: bool = False
    # It was reported here that it ended. Its owner has not said so yet.
    ended: bool = False


class Foreign:
    """Implements `mirror.Effects`. `me` is this replica. Belongs to one event loop; no call blocks."""

    def __init__(
        self,
        me: str,
        models: Mapping[str, Model],
        leases: Leases,
        now: Callable[[], float],
        settle: Settle,
    ) -> None:
        self._me = me
        self._models = models
        self._leases = leases
        self._now = now
        self._settle = settle
        self._held: dict[int, Held] = {}
        # Leases on workers that are not known here.
        self._weightless: set[int] = set()

    def __len__(self) -> int:
        return len(self._held)

    def ids(self) -> list[int]:
        """Those that selectors hold."""
        return [lease for lease, held in self._held.items() if held.model is not None and not held.ended]

    def owner(self, lease: int) -> str | None:
        """Whose it is; None where it is not known."""
        held = self._held.get(lease)
        return held.replica if held is not None else None

    def ended(self, lease: int) -> bool:
        """Whether it was reported here that it ended, and its owner has not said so."""
        held = self._held.get(lease)
        return held is not None and held.ended

    # What their owners say.

    def open(self, replica: str, told: ToldLease) -> None:
        lease = told.lease_id
        own = self._leases.get(lease)
        held = self._held.get(lease)
        if own is not None:
            if (told.takeovers, replica) > (own.takeovers, self._me):
                # This replica was not heard for a while, and who holds the lease went on elsewhere.
                self._leases.give_up(lease)
                held = self._held[lease] = Held(replica, _kept(told), own.model)
                self._move(held, told.prefilled, told.output_tokens, 0.0)
        elif held is None:
            held = self._held[lease] = Held(replica, _kept(told), None)
            self._adopt(held)
        elif held.replica == replica or (told.takeovers, replica) > (held.told.takeovers, held.replica):
            held.replica, held.told.takeovers = replica, told.takeovers
            self._move(held, told.prefilled, told.output_tokens, 0.0)

    def progress(self, replica: str, change: LeaseProgress) -> bool:
        held = self._held.get(change.lease_id)
        if held is None:
            return self._leases.get(change.lease_id) is not None
        if held.replica == replica:
            self._move(held, change.prefilled, change.output_tokens, change.transfer_ms)
        return True

    def end(self, replica: str, lease: int) -> None:
        held = self._held.get(lease)
        if held is not None and held.replica == replica:
            self._drop(lease, held)

    def lose(self, replica: str) -> int:
        """A replica is gone, and its leases with it; but those that are reported on here are this one's now.
        How many these are."""
        taken_over = 0
        for lease, held in [(lease, held) for lease, held in self._held.items() if held.replica == replica]:
            if held.heard and not held.ended and held.model is not None:
                del self._held[lease]
                self._weightless.discard(lease)
                self._leases.add(lease, _own(held.told, held.model, self._now()))
                taken_over += 1
            else:
                self._drop(lease, held)
        return taken_over

    # What holders say.

    def report(self, report: LeaseReport, *, here: bool) -> None:
        """Count with what was reported of a lease that `owner` knows, here or elsewhere; its owner is to be
        told. Of an end others hear by the owner: who was told may not live to pass it on."""
        held = self._held[report.lease_id]
        held.heard |= here
        self._move(held, report.prefill_done, report.output_tokens, report.transfer_ms)
        if report.ended and here and not held.ended:
            self._end(report.lease_id, held)
            held.ended = True

    def expired(self, lease: int) -> None:
        """The selector has reclaimed it: its owner is about to say so, or says it anew."""
        self._held.pop(lease, None)
        self._weightless.discard(lease)

    def retry(self) -> None:
        """Workers have joined: leases that were told before their workers were known weigh from now on."""
        for lease in list(self._weightless):
            held = self._held.get(lease)
            if held is not None and not held.ended:
                self._end(lease, held)
                self._adopt(held)

    def _adopt(self, held: Held) -> None:
        lease = held.told.lease_id
        held.model = self._models.get(held.told.model)
        if held.model is not None and held.model.adopt(held.told):
            self._weightless.discard(lease)
        else:
            self._weightless.add(lease)

    def _move(self, held: Held, prefilled: bool, output_tokens: int, transfer_ms: float) -> None:
        told = held.told
        told.output_tokens = max(told.output_tokens, output_tokens)
        if (prefilled or output_tokens) and not told.prefilled:
            told.prefilled = True
            told = held.told = _kept(told)
        if held.model is None or held.ended:
            return
        began = time.perf_counter()
        report = told.lease_id, told.prefilled, told.output_tokens, transfer_ms, False
        outcomes, _ = held.model.selector.report(self._now(), [report])
        self._settle(held.model, outcomes, began)

    def _drop(self, lease: int, held: Held) -> None:
        del self._held[lease]
        self._weightless.discard(lease)
        if not held.ended:
            self._end(lease, held)

    def _end(self, lease: int, held: Held) -> None:
        if held.model is not None:
            began = time.perf_counter()
            freed = held.model.selector.end(self._now(), lease)
            self._settle(held.model, freed or [], began)


def _kept(told: ToldLease) -> ToldLease:
    """A copy that keeps no message alive, and no hashes that are not needed any more."""
    kept = ToldLease()
    if told.prefilled:
        del told.block_hashes[:]
    kept.CopyFrom(told)
    return kept


def _own(told: ToldLease, model: Model, now: float) -> Live:
    """A lease that its owner leaves behind."""
    response = RouteResponse(expected=Expectation(cached=told.cached))
    response.placement.decode.CopyFrom(told.decode)
    if told.HasField("prefill"):
        response.placement.prefill.CopyFrom(told.prefill)
    return Live(
        model,
        told.prompt_tokens,
        None if told.prefilled else RouteRequest(block_hashes=told.block_hashes),
        response,
        decision=None,
        placed_ms=now,
        heard_ms=now,
        prefilled=told.prefilled,
        output_tokens=told.output_tokens,
        takeovers=told.takeovers + 1,
    )
