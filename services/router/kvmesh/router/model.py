"""One served model: its Selector, and its workers as discovery tells of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from kvmesh.common.capabilities import Names, needed, offered
from kvmesh.core import Placed, Refused, Selector
from kvmesh.router.index import IndexFeed
from kvmesh.router.placement import usable
from kvmesh.router.policies import Policies, judge
from kvmesh.v1.common_pb2 import Role, WorkerInfo
from kvmesh.v1.replicas_pb2 import ToldLease
from kvmesh.v1.router_pb2 import ClassRates, Law, LinkPace, ModelRates, RouteRequest, WorkerPace, WorkerRef

# SGLang's own choice on most accelerators; for engines that do not say.
PASS_TOKENS = 8192
# Deadlines beyond this are further away than waiting and prompts take: they would cost a look-up for nothing.
FAR_MS = 300_000
# No selector has such a worker.
NOBODY = 2**64 - 1

_ROLES = {
    Role.ROLE_PREFILL: "prefill",
    Role.ROLE_DECODE: "decode",
    Role.ROLE_AGGREGATED: "aggregated",
}


@dataclass(frozen=True, slots=True)
class Member:
    """One life of a worker in the selector, and what the index feed tells of it."""

    id: int
    info: WorkerInfo
    hardware_class: str
    selector: Selector
    now: Callable[[], float]

    def linked(self, index_id: int) -> None:
        self.selector.link(self.id, index_id)

    def apply(self, batch: bytes) -> None:
        self.selector.apply(self.now(), batch)

    def cleared(self) -> None:
        self.selector.cleared(self.id, now=self.now())


class Model:
    """Owns the selector of one model. `now` is in milliseconds and never falls."""

    def __init__(
        self, name: str, selector: Selector, block_tokens: int, feed: IndexFeed, now: Callable[[], float]
    ) -> None:
        self.name = name
        self.selector = selector
        self.block_tokens = block_tokens
        self._feed = feed
        self._now = now
        self._members: dict[str, Member] = {}
        self._by_id: dict[int, Member] = {}
        # Halves that can read each other's KV.
        self._pools: dict[tuple[str, int], int] = {}
        # Of every life there was, for decisions that are looked at later.
        self._names: dict[int, str] = {}
        self._external: set[str] = set()
        self._logged = (0, 0)

    def update(self, infos: Iterable[WorkerInfo]) -> None:
        """Take the model's workers as they are now: those that joined, left, restarted or changed."""
        wanted = {info.id: info for info in infos if usable(info) and info.role in _ROLES}
        for worker_id, member in list(self._members.items()):
            info = wanted.get(worker_id)
            if info is None or _identity(info) != _identity(member.info):
                self._remove(member)
        for info in wanted.values():
            if info.id not in self._members:
                self._add(info)

    def submit(
        self, number: int, request: RouteRequest, policy: str, policies: Policies
    ) -> list[Placed | Refused]:
        """Place or hold a request. Raises LookupError when no worker can take it."""
        self.use(policy, policies)
        now = self._now()
        return self.selector.submit(
            now,
            number,
            prompt_tokens=request.prompt_tokens,
            blocks=request.block_hashes[:],
            session=stable_hash(request.session_id) if request.session_id else 0,
            tenant=stable_hash(request.tenant) if request.tenant else 0,
            priority=request.priority,
            deadline=now + request.deadline_ms if 0 < request.deadline_ms < FAR_MS else None,
            exclude=self._known(request.exclude_worker_ids),
            needs=_hashes(needs_of(request)),
            policy=policy,
            explain=request.explain,
            name=request.request_id,
        )

    def select(self, request: RouteRequest, policy: str, policies: Policies) -> Placed:
        """What would be chosen now; nothing is kept of it. Raises LookupError when no worker can take it."""
        self.use(policy, policies)
        return self.selector.select(
            self._now(),
            prompt_tokens=request.prompt_tokens,
            blocks=request.block_hashes[:],
            session=stable_hash(request.session_id) if request.session_id else 0,
            tenant=stable_hash(request.tenant) if request.tenant else 0,
            priority=request.priority,
            exclude=self._known(request.exclude_worker_ids),
            needs=_hashes(needs_of(request)),
            policy=policy,
        )

    def adopt(self, told: ToldLease) -> bool:
        """Count a lease in that another replica has given out. False where a worker of it is not known here,
        or not in that life: there it weighs nothing."""
        decode = self._member_of(told.decode)
        prefill = self._member_of(told.prefill) if told.HasField("prefill") else decode
        cached = told.cached
        self.selector.adopt(
            self._now(),
            told.lease_id,
            prefill=prefill,
            decode=decode,
            prompt_tokens=told.prompt_tokens,
            cached=(cached.device, cached.host, cached.nvme, cached.network),
            blocks=told.block_hashes[:],
            prefilled=told.prefilled,
            output_tokens=told.output_tokens,
        )
        return NOBODY not in (prefill, decode)

    def withdraw(self, number: int) -> None:
        self.selector.withdraw(number, now=self._now())

    def set(self, policies: Policies, changes: Mapping[str, Any], by: str) -> list[Placed | Refused]:
        """Take changed settings over; `changes` are theirs by name. Returns what they refused."""
        for policy in (changes.get("policy"), *changes.get("shadow", ())):
            if policy is not None:
                self.use(policy, policies)
        wait_s = changes.get("max_wait_s")
        return self.selector.set(
            self._now(),
            by=by,
            policy=changes.get("policy"),
            temperature=changes.get("temperature"),
            max_held=changes.get("max_waiting"),
            max_wait_ms=None if wait_s is None else wait_s * 1000,
            shadows=list(changes["shadow"]) if "shadow" in changes else None,
        )

    def logged(self) -> tuple[int, int, str | None]:
        """Lines that the decision log has taken and lost since the last call, and what ails it."""
        lines, dropped, _, _, problem = self.selector.log_stats() or (0, 0, 0, 0, None)
        since = (lines - self._logged[0], dropped - self._logged[1], problem)
        self._logged = lines, dropped
        return since

    def use(self, policy: str, policies: Policies) -> None:
        """Make sure that the selector knows a policy. Raises KvmeshError(INVALID_ARGUMENT)."""
        if policy in self._external:
            return
        policies.check(policy)
        if policies.is_external(policy):
            judged = judge(policies.external(policy), self.worker_name)
            self.selector.add_policy(policy, judged, now=self._now())
        self._external.add(policy)

    def can_place(self, request: RouteRequest) -> bool:
        """Whether a worker, or a pair, is left for a request."""
        needs, exclude = needs_of(request), request.exclude_worker_ids
        infos = (member.info for member in self._members.values())
        left = [info for info in infos if info.id not in exclude and needs <= offered(info.model)]
        halves = {(_pool(info), info.role) for info in left}
        return any(
            role == Role.ROLE_AGGREGATED or (role == Role.ROLE_PREFILL and (pool, Role.ROLE_DECODE) in halves)
            for pool, role in halves
        )

    def info(self, member_id: int) -> WorkerInfo:
        """A worker that is there. Raises KeyError."""
        return self._by_id[member_id].info

    def worker_name(self, member_id: int) -> str:
        return self._names.get(member_id, "")

    def slots(self, worker_id: str) -> tuple[int, int, int, int]:
        """What live leases take of a worker: requests, of them streaming, prompt tokens queued, blocks."""
        member = self._members.get(worker_id)
        return self.selector.slots(member.id) if member is not None else (0, 0, 0, 0)

    def rates(self) -> ModelRates:
        count, bias, absolute, actual = self.selector.errors()
        return ModelRates(
            model=self.name,
            classes=[
                ClassRates(
                    hardware_class=name,
                    workers=workers,
                    laws=[
                        Law(name=law, coefficients=dict(coefficients), observations=seen, error=error)
                        for law, coefficients, seen, error in laws
                    ],
                )
                for name, workers, laws in self.selector.rates()
            ],
            workers=[self._pace(member) for _, member in sorted(self._members.items())],
            links=[link for _, member in sorted(self._members.items()) for link in self._links(member)],
            predictions=count,
            bias_ms=bias / max(count, 1),
            error_ms=absolute / max(count, 1),
            actual_ms=actual / max(count, 1),
        )

    def _pace(self, member: Member) -> WorkerPace:
        slowness, observations, error = self.selector.pace(member.id) or (0.0, 0, 0.0)
        return WorkerPace(
            worker_id=member.info.id,
            hardware_class=member.hardware_class,
            slowness=slowness,
            observations=observations,
            error=error,
        )

    def _links(self, member: Member) -> list[LinkPace]:
        return [
            LinkPace(
                prefill_id=self.worker_name(prefill),
                decode_id=member.info.id,
                slowness=slowness,
                observations=observations,
                error=error,
            )
            for prefill, slowness, observations, error in self.selector.links(member.id)
        ]

    def _known(self, worker_ids: Iterable[str]) -> list[int]:
        """Those of them that are there."""
        return [self._members[worker_id].id for worker_id in worker_ids if worker_id in self._members]

    def _member_of(self, ref: WorkerRef) -> int:
        member = self._members.get(ref.id)
        return member.id if member is not None and member.info.incarnation == ref.incarnation else NOBODY

    def _add(self, info: WorkerInfo) -> None:
        pool = self._pools.setdefault(_pool(info), len(self._pools))
        hardware_class = "/".join((info.engine, info.device or "unknown", info.model.name))
        member = Member(
            self.selector.add_worker(
                stable_hash(info.id),
                _ROLES[info.role],
                hardware_class=hardware_class,
                blocks=max(info.kv.total_blocks * max(info.kv.page_size, 1) // self.block_tokens, 1),
                pass_tokens=info.pass_tokens or PASS_TOKENS,
                pool=pool,
                prefill=[(each.tokens, 0, each.ms) for each in info.probe.prefill],
                decode=[(each.streams, each.pool_share, each.ms) for each in info.probe.decode],
                transfer=[(each.tokens, each.ms) for each in info.probe.transfer],
                offers=_hashes(offered(info.model)),
                name=info.id,
                now=self._now(),
            ),
            info,
            hardware_class,
            self.selector,
            self._now,
        )
        self._members[info.id] = self._by_id[member.id] = member
        self._names[member.id] = info.id
        self._feed.observe(info.id, member)

    def _remove(self, member: Member) -> None:
        self._feed.unobserve(member.info.id, member)
        self.selector.remove_worker(member.id, now=self._now())
        del self._members[member.info.id]
        del self._by_id[member.id]


def needs_of(request: RouteRequest) -> Names:
    """What its workers must be able to do."""
    return needed(request.needs, request.adapter)


@lru_cache(1024)
def _hashes(names: Names) -> tuple[int, ...]:
    """As the selector takes them."""
    return tuple(stable_hash(name) for name in sorted(names))


def stable_hash(name: str) -> int:
    """The same in every process: replicas send a session to the same worker."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def _pool(info: WorkerInfo) -> tuple[str, int]:
    return info.engine, info.kv.page_size


def _identity(info: WorkerInfo) -> tuple[object, ...]:
    offers = offered(info.model)
    return info.incarnation, info.address, info.role, _pool(info), info.kv.total_blocks, offers
