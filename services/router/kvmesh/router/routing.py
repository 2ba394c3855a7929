"""Decides where requests run: one Selector a model, the requests that wait, the leases, and the timers.

Decisions are made by the turn: requests that one turn of the event loop brings are planned as one, and time
stands still for the selectors meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from random import Random

import structlog

from kvmesh.common import metrics
from kvmesh.common.config import RouterConfig
from kvmesh.common.discovery import Discovery
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.core import Placed, Refused, Selector
from kvmesh.router import placement
from kvmesh.router.decisions import Decision, Decisions, cached_proto
from kvmesh.router.index import IndexFeed
from kvmesh.router.model import Model, stable_hash
from kvmesh.router.policies import Policies
from kvmesh.router.prefetch import Prefetches
from kvmesh.router.settings import Settings
from kvmesh.v1 import engine_pb2, router_pb2
from kvmesh.v1.common_pb2 import CachedTokens, WorkerInfo
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

# Milliseconds that a turn stands for: the clock has always moved on by the next.
GATHER_MS = 0.001
# Seconds between looks that nothing caused: leases expire, and what was speculated and not confirmed.
PERIOD_S = 1.0
# Leases whose holder's stream broke live on for so long without a report; holders report every second.
ORPHANED_S = 5.0
# Block size of a model whose workers say none.
BLOCK_TOKENS = 16
TIERS = ("device", "host", "nvme", "network")

Answer = Callable[[router_pb2.RouteResponse | KvmeshError], None]


@dataclass(slots=True)
class Waiting:
    """A request without a placement."""

    model: Model
    request: router_pb2.RouteRequest
    answer: Answer


@dataclass(slots=True)
class Live:
    """A lease. Its decision is there until the first token."""

    model: Model
    placed_ms: float
    decision: Decision | None
    # When it was last reported on, or placed.
    heard_ms: float


class Routing:
    """Belongs to one event loop; no call blocks."""

    def __init__(
        self,
        discovery: Discovery,
        feed: IndexFeed,
        config: RouterConfig,
        *,
        random: Random,
        clock: Callable[[], float] = time.monotonic,
        prefetches: Prefetches | None = None,
    ) -> None:
        """Raises KvmeshError(INVALID_ARGUMENT) for an unknown policy, or a log that cannot be written."""
        self._discovery = discovery
        self._feed = feed
        self._config = config
        self._random = random
        self._clock = clock
        self._prefetches = prefetches
        self._began = clock()
        self.policies = Policies(random)
        self.settings = Settings.of(config, self.policies)
        self._epoch = time.time()
        self._run = f"{random.getrandbits(64):016x}"
        _check_directory(config.decision_log.path)
        self.decisions = Decisions(config.explained_requests)
        self.models: dict[str, Model] = {}
        self._names: dict[str, str] = {}
        self._waiting: dict[int, Waiting] = {}
        self._live: dict[int, Live] = {}
        self._number = 0
        self._generation = -1
        # Of the turn under way: its time, and what ends it.
        self._turn_ms = 0.0
        self._turn: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._started = False
        self._metrics = metrics.router()
        self._metrics.leases.set_function(lambda: self.leases)
        self._metrics.held.set_function(lambda: len(self._waiting))
        discovery.subscribe(self._on_members)
        self._on_members()

    def start(self) -> None:
        """Begin looking about once a second."""
        self._started = True
        self._arm()

    def close(self) -> None:
        """Stop; requests that wait are told that this router is going."""
        self._started = False
        for handle in (self._timer, self._turn):
            if handle is not None:
                handle.cancel()
        self._timer = self._turn = None
        for number in list(self._waiting):
            self._refuse(number, KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, "the router is stopping"))
        for model in self.models.values():
            model.selector.close_log()

    # Requests.

    def submit(self, request: router_pb2.RouteRequest, answer: Answer) -> int:
        """Place a request, now or later. Returns its number.

        `answer` is called once, unless the request is cancelled before. Raises KvmeshError when it is refused
        at once; there is no answer then.
        """
        began = time.perf_counter()
        self._number += 1
        number = self._number
        try:
            model, outcomes = self._submit(number, request)
        except KvmeshError as error:
            self._metrics.refusals.labels(ErrorCode.Name(error.code)).inc()
            raise
        self._waiting[number] = Waiting(model, request, answer)
        self._settle(model, outcomes, began)
        return number

    def cancel(self, number: int) -> bool:
        """Take a request back that waits; False when it was answered."""
        waiting = self._waiting.pop(number, None)
        if waiting is None:
            return False
        waiting.model.withdraw(number)
        self._metrics.withdrawn.inc()
        return True

    def waits(self, number: int) -> bool:
        return number in self._waiting

    # Leases.

    def report(self, reports: Iterable[router_pb2.LeaseReport]) -> list[int]:
        """Account for how leases fare; the ids of those not held here."""
        unknown = [report.lease_id for report in reports if not self._report(report)]
        if unknown:
            self._metrics.unknown_leases.inc(len(unknown))
        return unknown

    def end(self, lease: int) -> None:
        """End a lease whose placement nobody will use."""
        self.report([router_pb2.LeaseReport(lease_id=lease, ended=True)])

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

    @property
    def leases(self) -> int:
        return sum(model.selector.leases for model in self.models.values())

    @property
    def held(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def configure(self, request: router_pb2.ConfigureRequest, by: str) -> Settings:
        """Change what holds for requests from now on, and say so; `by` is who asked.

        Raises KvmeshError(INVALID_ARGUMENT); nothing is changed then.
        """
        began = time.perf_counter()
        old, self.settings = self.settings, self.settings.changed(request, self.policies)
        changes = self.settings.differences(old)
        if changes:
            log.info("settings changed", by=by, **changes)
            for model in self.models.values():
                self._settle(model, model.set(self.policies, changes, by), began)
        return self.settings

    def tick(self) -> None:
        """Do what is due in all models."""
        began = time.perf_counter()
        now = self._now()
        for model in self.models.values():
            outcomes, expired = model.selector.tick(now)
            for lease in expired:
                self._live.pop(lease, None)
            if expired:
                self._metrics.leases_ended.labels("expired").inc(len(expired))
            if outcomes:
                self._settle(model, outcomes, began)
        self._count_log()
        self._arm()

    # Time.

    def _now(self) -> float:
        if self._turn is not None:
            return self._turn_ms
        return max((self._clock() - self._began) * 1000, self._turn_ms)

    def _begin_turn(self) -> None:
        if self._turn is None:
            self._turn_ms = self._now()
            self._turn = asyncio.get_running_loop().call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._turn = None
        self._turn_ms += 2 * GATHER_MS
        self.tick()

    def _arm(self) -> None:
        """Be there when a selector wants to be called, and after a while if none does."""
        if not self._started:
            return
        now = self._now()
        due = [model.selector.wakes_at(now) for model in self.models.values() if model.selector.held]
        delays = [(at - now) / 1000 for at in due if at is not None]
        loop = asyncio.get_running_loop()
        at = loop.time() + max(min([*delays, PERIOD_S]), 0.0)
        if self._timer is not None:
            if loop.time() < self._timer.when() <= at:
                return
            self._timer.cancel()
        self._timer = loop.call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.tick()

    # What selectors say.

    def _submit(self, number: int, request: router_pb2.RouteRequest) -> tuple[Model, list[Placed | Refused]]:
        workers = self._discovery.workers()
        name = placement.resolve(workers, self._names, request.model)
        model = self.models.get(name)
        if model is not None:
            self._begin_turn()
            try:
                return model, model.submit(
                    number, request, request.policy or self.settings.policy, self.policies
                )
            except LookupError:
                pass
        raise placement.none_ready(workers, name, request.exclude_worker_ids)

    def _settle(self, model: Model, outcomes: list[Placed | Refused], began: float) -> None:
        if outcomes:
            each = (time.perf_counter() - began) / len(outcomes)
            for outcome in outcomes:
                if isinstance(outcome, Placed):
                    self._metrics.decision.observe(each)
                    self._placed(model, outcome)
                else:
                    self._refuse(outcome.request, _refusal(outcome))
        if model.selector.held and self._turn is None:
            self._arm()

    def _placed(self, model: Model, placed: Placed) -> None:
        waiting = self._waiting.pop(placed.request)
        prefill, decode = model.info(placed.prefill), model.info(placed.decode)
        request = waiting.request
        decision = Decision(
            request.request_id, model.name, time.time(), request.prompt_tokens, placed, model.worker_name
        )
        self.decisions.add(decision)
        now = self._now()
        self._live[placed.lease] = Live(model, now, decision, now)
        cached = cached_proto(placed.cached)
        response = router_pb2.RouteResponse(
            placement=self._placement(prefill, decode),
            expected=router_pb2.Expectation(cached=cached),
            lease=router_pb2.Lease(id=placed.lease, ttl_ms=round(self._config.lease_ttl_s * 1000)),
            policy=placed.policy,
        )
        if request.explain:
            response.candidates.extend(decision.candidates())
        self._count(request, placed, cached)
        self._count_shadows(placed)
        waiting.answer(response)
        if self._prefetches is not None:
            within = placed.ttft_ms
            self._prefetches.placed(prefill, request.block_hashes, model.block_tokens, cached, within)

    def _refuse(self, number: int, error: KvmeshError) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            self._metrics.refusals.labels(ErrorCode.Name(error.code)).inc()
            waiting.answer(error)

    def _placement(self, prefill: WorkerInfo, decode: WorkerInfo) -> router_pb2.Placement:
        if prefill is decode:
            return router_pb2.Placement(decode=_ref(decode))
        bootstrap = prefill.bootstrap
        return router_pb2.Placement(
            prefill=_ref(prefill),
            decode=_ref(decode),
            bootstrap=engine_pb2.Bootstrap(
                host=bootstrap.host, port=bootstrap.port, room=self._random.getrandbits(63)
            ),
        )

    def _count(self, request: router_pb2.RouteRequest, placed: Placed, cached: CachedTokens) -> None:
        mode = "aggregated" if placed.prefill == placed.decode else "disaggregated"
        self._metrics.placements.labels(placed.policy, mode).inc()
        self._metrics.waited.observe(placed.held_ms / 1000)
        self._metrics.prompt_tokens.inc(request.prompt_tokens)
        for tier in TIERS:
            if tokens := getattr(cached, tier):
                self._metrics.cached_tokens.labels(tier).inc(tokens)

    def _count_shadows(self, placed: Placed) -> None:
        made = placed.prefill, placed.decode
        for policy, prefill, decode, cost, ttft, live_cost, live_ttft in placed.shadows():
            choice = "same" if (prefill, decode) == made else "other"
            self._metrics.shadow_placements.labels(policy, choice).inc()
            for of, cost_ms, ttft_ms in (("shadow", cost, ttft), ("live", live_cost, live_ttft)):
                self._metrics.shadow_cost.labels(policy, of).inc(cost_ms / 1000)
                self._metrics.shadow_ttft.labels(policy, of).inc(ttft_ms / 1000)

    def _count_log(self) -> None:
        if not self._config.decision_log.path:
            return
        failing = 0
        for model in self.models.values():
            lines, dropped, problem = model.logged()
            self._metrics.log_lines.inc(lines)
            self._metrics.log_dropped.inc(dropped)
            failing += problem is not None
            if dropped:
                log.warning("decision log is missing lines", model=model.name, lines=dropped, error=problem)
        self._metrics.log_failing.set(failing)

    def _report(self, report: router_pb2.LeaseReport) -> bool:
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

    def _learn(self, live: Live, decision: Decision, report: router_pb2.LeaseReport, now: float) -> None:
        """How far the predicted time to the first token was off."""
        placed = decision.placed
        split = placed.prefill != placed.decode
        if report.output_tokens or (report.prefill_done and not split):
            live.decision = None
            decision.actual_ttft_ms = actual = now - live.placed_ms
            self._metrics.ttft_actual.inc(actual / 1000)
            self._metrics.ttft_predicted.inc(placed.ttft_ms / 1000)
            self._metrics.ttft_error.observe(abs(actual - placed.ttft_ms) / 1000)

    # Members.

    def _on_members(self) -> None:
        """Take discovery's view over; what waits for workers that are gone is refused."""
        if self._generation == self._discovery.generation:
            return
        self._generation = self._discovery.generation
        workers = self._discovery.workers()
        self._names = placement.model_names(workers.values())
        of_model: dict[str, list[WorkerInfo]] = {name: [] for name in self.models}
        for info in workers.values():
            if info.model.name:
                of_model.setdefault(info.model.name, []).append(info)
        for name, infos in of_model.items():
            if name not in self.models:
                self.models[name] = self._make(name, infos)
            self.models[name].update(infos)
        for number, waiting in list(self._waiting.items()):
            excluded = waiting.request.exclude_worker_ids
            if not waiting.model.can_place(excluded):
                waiting.model.withdraw(number)
                self._refuse(number, placement.none_ready(workers, waiting.model.name, excluded))

    def _make(self, name: str, infos: list[WorkerInfo]) -> Model:
        block_tokens = next((info.kv.page_size for info in infos if info.kv.page_size), BLOCK_TOKENS)
        settings = self.settings
        selector = Selector(
            self._feed.index,
            block_tokens=block_tokens,
            seed=self._random.getrandbits(64),
            temperature=settings.temperature,
            gather_ms=GATHER_MS,
            lease_ttl_ms=self._config.lease_ttl_s * 1000,
            max_held=settings.max_waiting,
            max_wait_ms=settings.max_wait_s * 1000,
            weights={stable_hash(name): share for name, share in self._config.tenant_weights.items()},
        )
        model = Model(name, selector, block_tokens, self._feed, self._now)
        self._open_log(name, selector)
        model.set(self.policies, {"policy": settings.policy, "shadow": settings.shadow}, "configuration")
        return model

    def _open_log(self, name: str, selector: Selector) -> None:
        wanted = self._config.decision_log
        if not wanted.path:
            return
        try:
            selector.open_log(
                wanted.path,
                model=name,
                run=self._run,
                epoch=self._epoch,
                max_bytes=wanted.max_bytes,
                max_files=wanted.max_files,
            )
        except OSError as error:
            # Requests come first.
            log.error("no decision log is written", model=name, path=wanted.path, error=str(error))


def _check_directory(path: str) -> None:
    """Make it, where one is wanted. Raises KvmeshError(INVALID_ARGUMENT) when it cannot be written."""
    if not path:
        return
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise invalid(f"router.decision_log.path: cannot make {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise invalid(f"router.decision_log.path: {path} cannot be written")


def _refusal(refused: Refused) -> KvmeshError:
    if refused.reason == "no-worker":
        return KvmeshError(
            ErrorCode.ERROR_CODE_NO_WORKER_READY,
            "the workers this request could go to have left; retry shortly",
            retry_after_ms=placement.RETRY_AFTER_MS,
        )
    why = {
        "full": "too many requests wait",
        "waited": "no worker had room in time",
        "deadline": "no worker could answer before the request's deadline",
    }[refused.reason]
    return KvmeshError(
        ErrorCode.ERROR_CODE_RATE_LIMITED,
        f"{why}; retry after the time given",
        retry_after_ms=max(round(refused.retry_after_ms), 1),
    )


def _ref(info: WorkerInfo) -> router_pb2.WorkerRef:
    return router_pb2.WorkerRef(id=info.id, incarnation=info.incarnation, address=info.address)
