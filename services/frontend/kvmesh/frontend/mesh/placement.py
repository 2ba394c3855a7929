"""Asks the routers where a request runs, and does without where none answers."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import structlog

from kvmesh.common.block_names import block_salt, chain_seed
from kvmesh.common.capabilities import needed
from kvmesh.common.errors import KvmeshError
from kvmesh.common.telemetry import span
from kvmesh.core import hash_tokens
from kvmesh.frontend.mesh.fallback import POLICY, FallbackPlacement
from kvmesh.frontend.mesh.leases import HeldLease, Leases
from kvmesh.frontend.mesh.routers import ELSEWHERE, Answer, Routers
from kvmesh.frontend.serving.call import Call
from kvmesh.v1.router_pb2 import Candidate, Placement, RouteRequest

log = structlog.get_logger()


@dataclass(slots=True)
class Routed:
    """A placement and what came with it. The lease is None when the router was not asked."""

    placement: Placement
    lease: HeldLease | None
    candidates: Sequence[Candidate]
    policy: str


class Placer:
    """Places requests by a router, else by `fallback`."""

    def __init__(self, routers: Routers, fallback: FallbackPlacement) -> None:
        self._routers = routers
        self._fallback = fallback
        self._without = False
        self.leases = Leases(routers)

    async def place(self, call: Call, excluded: Collection[str]) -> Routed:
        """Raises KvmeshError: NO_WORKER_READY, UNSUPPORTED, or what the router refuses the request for."""
        try:
            return await self._route(call, excluded)
        except KvmeshError as error:
            if error.code not in ELSEWHERE or time.monotonic() >= call.deadline:
                raise
            needs = needed(call.needs, call.model.adapter)
            placement = self._fallback.place(call.model.info.name, needs, excluded)
            if not self._without:
                self._without = True
                log.warning("placing without a router", error=error.message)
        return Routed(placement, None, (), POLICY)

    async def _route(self, call: Call, excluded: Collection[str]) -> Routed:
        kv = call.model.kv
        namespace = chain_seed(block_salt(call.cache_salt, call.model.adapter)) or kv.namespace
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
            needs=call.needs,
            adapter=call.model.adapter,
            hint=call.hint,
        )
        response, router = await self._ask(request, call)
        if self._without:
            self._without = False
            log.info("placing by a router again", router=router.address)
        lease = self.leases.hold(response.lease, router) if response.HasField("lease") else None
        return Routed(response.placement, lease, response.candidates, response.policy)

    async def _ask(self, request: RouteRequest, call: Call) -> Answer:
        with span("route", request_id=request.request_id):
            try:
                return await self._routers.route(request, call.deadline, call.first_by)
            except KvmeshError as refusal:
                if refusal.param == "policy":
                    # Where the client wrote it.
                    refusal.param = "kvmesh.policy"
                raise
