"""Decides where requests run: one Selector a model, and the requests that wait.

Decisions are made by the turn: requests that one turn of the event loop brings are planned as one, and time
stands still for the selectors meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import structlog

from kvmesh.common import metrics
from kvmesh.common.config import RouterConfig
from kvmesh.common.discovery import Discovery
from kvmesh.common.errors import KvmeshError
from kvmesh.core import Placed, Refused, Selector
from kvmesh.router import placement
from kvmesh.router.answers import refusal, write_placement
from kvmesh.router.counts import count_placed, count_shadows
from kvmesh.router.decision_log import DecisionLogs
from kvmesh.router.decisions import Decision, Decisions, cached_proto
from kvmesh.router.index import IndexFeed
from kvmesh.router.leases import Leases, Live
from kvmesh.router.model import Model, needs_of, stable_hash
from kvmesh.router.policies import Policies
from kvmesh.router.settings import Settings
from kvmesh.router.store_advice import StoreAdvice
from kvmesh.router.turns import GATHER_MS, Turns
from kvmesh.v1 import router_pb2
from kvmesh.v1.common_pb2 import WorkerInfo
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

# Block size of a model whose workers say none.
BLOCK_TOKENS = 16
# Of every decision so many candidates are kept for those who ask later, the cheapest.
EXPLAINED = 16

Answer = Callable[[router_pb2.RouteResponse | KvmeshError], None]


@dataclass(slots=True)
class Waiting:
    """A request without a placement."""

    model: Model
    request: router_pb2.RouteRequest
    answer: Answer


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
        advice: StoreAdvice | None = None,
    ) -> None:
        """Raises KvmeshError(INVALID_ARGUMENT) for an unknown policy, or a log that cannot be written."""
        self._discovery = discovery
        self._feed = feed
        self._config = config
        self._lease_ttl_ms = round(config.lease_ttl_s * 1000)
        self._random = random
        self._advice = advice
        self._metrics = metrics.router()
        self.policies = Policies(random)
        self.settings = Settings.of(config, self.policies)
        self._logs = DecisionLogs(config.decision_log, f"{random.getrandbits(64):016x}", self._metrics)
        self.decisions = Decisions(config.explained_requests)
        self.turns = Turns(clock, self.tick, self._due)
        self.leases = Leases(self.turns.now, self.settle, self._metrics)
        self.models: dict[str, Model] = {}
        self._names: dict[str, str] = {}
        self._waiting: dict[int, Waiting] = {}
        self._number = 0
        self._generation = -1
        self._metrics.leases.set_function(lambda: self.live)
        self._metrics.leaked_leases.set_function(lambda: self.leaked)
        self._metrics.held.set_function(lambda: len(self._waiting))
        discovery.subscribe(self._on_members)
        self._on_members()

    def start(self) -> None:
        """Begin looking about once a second."""
        self.turns.start()

    def close(self) -> None:
        """Stop; requests that wait are told that this router is going."""
        self.turns.close()
        for number in list(self._waiting):
            self._refuse(number, KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, "the router is stopping"))
        for model in self.models.values():
            model.selector.close_log()

    @property
    def live(self) -> int:
        """Leases that are out."""
        return sum(model.selector.leases for model in self.models.values())

    @property
    def leaked(self) -> int:
        """Leases that selectors hold and nobody will end, and slots whose lease is gone; 0."""
        slots = sum(model.selector.leaked for model in self.models.values())
        return abs(self.live - self.leases.known()) + slots

    @property
    def held(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

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
        self.settle(model, outcomes, began)
        return number

    def cancel(self, number: int) -> bool:
        """Take a request back that waits; False when it was answered."""
        waiting = self._waiting.pop(number, None)
        if waiting is None:
            return False
        waiting.model.withdraw(number)
        self._metrics.withdrawn.inc()
        self._look_about(waiting.model)
        return True

    def waits(self, number: int) -> bool:
        return number in self._waiting

    def select(self, request: router_pb2.RouteRequest) -> router_pb2.SelectResponse:
        """What a request's placement would be, were it made now; nothing is kept. Raises KvmeshError."""
        model = self._model_of(request)
        policy = request.policy or self.settings.policy
        try:
            placed = model.select(request, policy, self.policies)
        except LookupError:
            raise self._none_ready(model.name, request) from None
        decision = Decision.of(request, model, placed)
        response = router_pb2.SelectResponse(
            expected=router_pb2.Expectation(cached=cached_proto(placed.cached)),
            candidates=decision.candidates() if request.explain else (),
            policy=placed.policy,
            predicted_ttft_ms=placed.ttft_ms,
        )
        prefill, decode = model.info(placed.prefill), model.info(placed.decode)
        write_placement(response.placement, prefill, decode, self._random)
        return response

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
                self.settle(model, model.set(self.policies, changes, by), began)
        return self.settings

    def tick(self) -> None:
        """Do what is due in all models."""
        began = time.perf_counter()
        now = self.turns.now()
        for model in self.models.values():
            outcomes, expired = model.selector.tick(now)
            self.leases.expired(expired)
            if outcomes:
                self.settle(model, outcomes, began)
        self._logs.count(self.models.values())
        self.turns.arm()

    def _due(self, now: float) -> Iterator[float]:
        """When selectors want to be called."""
        for model in self.models.values():
            if model.selector.held and (at := model.selector.wakes_at(now)) is not None:
                yield at

    # What selectors say.

    def _none_ready(self, model: str, request: router_pb2.RouteRequest) -> KvmeshError:
        workers, excluded = self._discovery.workers(), request.exclude_worker_ids
        return placement.none_ready(workers, model, needs_of(request), excluded)

    def _model_of(self, request: router_pb2.RouteRequest) -> Model:
        """The model that a request means. Raises KvmeshError where there is none."""
        name = placement.resolve(self._discovery.workers(), self._names, request.model)
        model = self.models.get(name)
        if model is None:
            raise self._none_ready(name, request)
        return model

    def _submit(self, number: int, request: router_pb2.RouteRequest) -> tuple[Model, list[Placed | Refused]]:
        model = self._model_of(request)
        self.turns.begin()
        try:
            return model, model.submit(number, request, request.policy or self.settings.policy, self.policies)
        except LookupError:
            raise self._none_ready(model.name, request) from None

    def settle(self, model: Model, outcomes: list[Placed | Refused], began: float) -> None:
        """Answer those whom a call decided on that began at a `time.perf_counter`."""
        if outcomes:
            each = (time.perf_counter() - began) / len(outcomes)
            for outcome in outcomes:
                if isinstance(outcome, Placed):
                    self._metrics.decision.observe(each)
                    self._placed(model, outcome)
                else:
                    self._refuse(outcome.request, refusal(outcome))
        self._look_about(model)

    def _look_about(self, model: Model) -> None:
        """Be there when a model's selector, which was called, wants to be: now, where what waits has room."""
        if model.selector.held and not self.turns.under_way:
            self.turns.arm()

    def _placed(self, model: Model, placed: Placed) -> None:
        waiting = self._waiting.pop(placed.request)
        prefill, decode = model.info(placed.prefill), model.info(placed.decode)
        request = waiting.request
        decision = Decision.of(request, model, placed)
        self.decisions.add(decision)
        # Written in place: a message that is given to another is copied.
        response = router_pb2.RouteResponse(policy=placed.policy)
        write_placement(response.placement, prefill, decode, self._random)
        cached = response.expected.cached
        cached.device, cached.host, cached.nvme, cached.network = placed.cached
        response.lease.id = placed.lease
        response.lease.ttl_ms = self._lease_ttl_ms
        if request.explain:
            response.candidates.extend(decision.candidates())
        now = self.turns.now()
        lease = Live(model, request.prompt_tokens, request, response, decision, placed_ms=now, heard_ms=now)
        self.leases.add(placed.lease, lease)
        self._metrics.prompt_tokens.inc(request.prompt_tokens)
        count_placed(self._metrics, placed)
        count_shadows(self._metrics, placed)
        waiting.answer(response)
        if self._advice is not None:
            within = placed.ttft_ms
            self._advice.placed(request, prefill, decode, model.block_tokens, cached, within)

    def _refuse(self, number: int, error: KvmeshError) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            self._metrics.refusals.labels(ErrorCode.Name(error.code)).inc()
            waiting.answer(error)

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
            if not waiting.model.can_place(waiting.request):
                waiting.model.withdraw(number)
                self._refuse(number, self._none_ready(waiting.model.name, waiting.request))
        for model in self.models.values():
            self._look_about(model)

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
            explained=EXPLAINED,
            max_held=settings.max_waiting,
            max_wait_ms=settings.max_wait_s * 1000,
            weights={stable_hash(name): share for name, share in self._config.tenant_weights.items()},
        )
        model = Model(name, selector, block_tokens, self._feed, self.turns.now)
        self._logs.open(name, selector)
        model.set(self.policies, {"policy": settings.policy, "shadow": settings.shadow}, "configuration")
        return model
