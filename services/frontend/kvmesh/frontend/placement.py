"""Asks the router where a request runs, and does without it where there is none."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import structlog

from kvmesh.common.errors import KvmeshError
from kvmesh.common.telemetry import span
from kvmesh.core import hash_tokens, namespace_seed
from kvmesh.frontend.call import Call
from kvmesh.frontend.leases import HeldLease, Leases
from kvmesh.frontend.placement_fallback import POLICY, FallbackPlacement
from kvmesh.frontend.router_link import RouterLink
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import Candidate, Placement, RouteRequest, RouteResponse

log = structlog.get_logger()

# Seconds until the router says something; it may be that the request waits.
_ROUTE_TIMEOUT_S = 2.0
# A router that said nothing is left alone for this long.
_PAUSE_S = 1.0

# The router cannot answer, or knows less than discovery does (it has just started).
_DO_WITHOUT = {
    ErrorCode.ERROR_CODE_UNAVAILABLE,
    ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED,
    ErrorCode.ERROR_CODE_CANCELLED,
    ErrorCode.ERROR_CODE_INTERNAL,
    ErrorCode.ERROR_CODE_NO_WORKER_READY,
    ErrorCode.ERROR_CODE_MODEL_NOT_FOUND,
}


@dataclass(slots=True)
class Routed:
    """A placement and what came with it. The lease is None when the router was not asked."""

    placement: Placement
    lease: HeldLease | None
    candidates: Sequence[Candidate]
    policy: str


class Placer:
    """Places requests by the router, else by `fallback`."""

    def __init__(self, router: RouterLink, fallback: FallbackPlacement) -> None:
        self._router = router
        self._fallback = fallback
        self._ask_again = 0.0
        self._without = False
        self.leases = Leases(router.report)

    async def place(self, call: Call, excluded: Collection[str]) -> Routed:
        """Raises KvmeshError: NO_WORKER_READY, or what the router refuses the request for."""
        now = time.monotonic()
        if now >= self._ask_again:
            try:
                return await self._route(call, excluded, call.deadline - now)
            except KvmeshError as error:
                if error.code not in _DO_WITHOUT or time.monotonic() >= call.deadline:
                    raise
                if error.code == ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED:
                    self._ask_again = time.monotonic() + _PAUSE_S
                placement = self._fallback.place(call.model.info.name, excluded)
                if not self._without:
                    self._without = True
                    log.warning(
                        "placing without the router", router=self._router.address, error=error.message
                    )
        else:
            placement = self._fallback.place(call.model.info.name, excluded)
        return Routed(placement, None, (), POLICY)

    async def _route(self, call: Call, excluded: Collection[str], left: float) -> Routed:
        """`left` are the seconds until the call's deadline."""
        kv = call.model.kv
        namespace = namespace_seed(cache_salt=call.cache_salt) if call.cache_salt else kv.namespace
        request = RouteRequest(
            request_id=call.request_id,
            model=call.model.info.name,
            block_hashes=hash_tokens(call.token_ids, kv.page_size, namespace).tolist(),
            prompt_tokens=len(call.token_ids),
            max_new_tokens=call.sampling.max_new_tokens,
            tenant=call.tenant,
            session_id=call.session_id,
            priority=call.priority,
            policy=call.policy,
            explain=call.explain,
            exclude_worker_ids=excluded,
            deadline_ms=max(1, int(left * 1000)),
        )
        answer = await self._ask(request, left)
        if self._without:
            self._without = False
            log.info("placing by the router again", router=self._router.address)
        lease = self.leases.hold(answer.lease) if answer.HasField("lease") else None
        return Routed(answer.placement, lease, answer.candidates, answer.policy)

    async def _ask(self, request: RouteRequest, left: float) -> RouteResponse:
        with span("route", request_id=request.request_id):
            try:
                return await self._router.route(request, min(_ROUTE_TIMEOUT_S, left), left)
            except KvmeshError as refusal:
                if refusal.param == "policy":
                    # Where the client wrote it.
                    refusal.param = "kvmesh.policy"
                raise
