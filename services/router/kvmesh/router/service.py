"""RouterService: what others may ask a router."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from random import Random
from typing import Any

import grpc

from kvmesh.common import metrics
from kvmesh.common.bus import Bus
from kvmesh.common.config import RouterConfig
from kvmesh.common.discovery import Discovery
from kvmesh.common.errors import KvmeshError
from kvmesh.common.lifecycle import RoleServer
from kvmesh.router.calls import RouteCall, answered
from kvmesh.router.index import IndexFeed
from kvmesh.router.replicas.replicas import Replicas
from kvmesh.router.route_stream import RouteStream
from kvmesh.router.routing import Routing
from kvmesh.router.store_advice import StoreAdvice
from kvmesh.v1 import router_pb2, router_pb2_grpc
from kvmesh.v1.common_pb2 import Role, WorkerInfo, WorkerState
from kvmesh.v1.errors_pb2 import ErrorCode


class RouterService(router_pb2_grpc.RouterServiceServicer):
    """Belongs to one event loop."""

    def __init__(
        self,
        discovery: Discovery,
        bus: Bus,
        feed: IndexFeed,
        config: RouterConfig,
        *,
        random: Random,
        clock: Callable[[], float] = time.monotonic,
        advice: StoreAdvice | None = None,
    ) -> None:
        """Raises KvmeshError(INVALID_ARGUMENT) for an unknown policy, or a log that cannot be written."""
        self._discovery = discovery
        self._bus = bus
        self._feed = feed
        self.routing = Routing(discovery, feed, config, random=random, clock=clock, advice=advice)
        self.replicas = Replicas(self.routing, discovery, bus)
        self._generation = -1
        self._workers = metrics.router().workers
        discovery.subscribe(self._on_members)
        self._on_members()

    def add_to(self, server: RoleServer) -> None:
        """Be served: the methods that every request takes off the data plane."""
        name, routing = "kvmesh.v1.RouterService", self.routing
        server.add_service(name, router_pb2_grpc.add_RouterServiceServicer_to_server, self)
        server.add_stream(name, "RouteStream", lambda stream: RouteStream(stream, routing))
        server.add_unary(name, "Route", lambda call: RouteCall(call, routing))
        server.add_unary(name, "Select", answered(router_pb2.SelectRequest, self.select))
        server.add_unary(name, "Report", answered(router_pb2.ReportRequest, self.report))

    def start(self) -> None:
        self.routing.start()

    def close(self) -> None:
        self.replicas.close()
        self.routing.close()

    async def Route(
        self, request: router_pb2.RouteRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.RouteResponse:
        return await self.route(request)

    async def Select(
        self, request: router_pb2.SelectRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.SelectResponse:
        return self.select(request)

    async def Report(
        self, request: router_pb2.ReportRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.ReportResponse:
        return self.report(request)

    async def GetState(
        self, request: router_pb2.GetStateRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.GetStateResponse:
        return self.state()

    async def Explain(
        self, request: router_pb2.ExplainRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.ExplainResponse:
        decisions = self.routing.decisions.of(request.request_id)
        if not decisions:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_NOT_FOUND,
                f"this router knows no placement of request `{request.request_id}`; it keeps the latest only",
            )
        return router_pb2.ExplainResponse(decisions=[decision.to_proto() for decision in decisions])

    async def GetRates(
        self, request: router_pb2.GetRatesRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.GetRatesResponse:
        models = sorted(self.routing.models.items())
        return router_pb2.GetRatesResponse(models=[model.rates() for _, model in models])

    async def Configure(
        self, request: router_pb2.ConfigureRequest, context: grpc.aio.ServicerContext
    ) -> router_pb2.ConfigureResponse:
        return self.routing.configure(request, context.peer()).to_proto()

    async def route(self, request: router_pb2.RouteRequest) -> router_pb2.RouteResponse:
        """Place one request and lease what it will use, once there is room; cancelled, leave nothing behind.

        Raises KvmeshError.
        """
        placed: asyncio.Future[router_pb2.RouteResponse] = asyncio.get_running_loop().create_future()

        def answer(result: router_pb2.RouteResponse | KvmeshError) -> None:
            if placed.cancelled():
                pass  # taken back below
            elif isinstance(result, KvmeshError):
                placed.set_exception(result)
            else:
                placed.set_result(result)

        number = self.routing.submit(request, answer)
        try:
            return await asyncio.shield(placed)
        except asyncio.CancelledError:
            if not self.routing.cancel(number) and placed.exception() is None:
                self.routing.leases.end(placed.result().lease.id)
            raise

    def state(self) -> router_pb2.GetStateResponse:
        routing = self.routing
        # What is over by now is not in it.
        routing.tick()
        stats = self._feed.index.stats()
        return router_pb2.GetStateResponse(
            policy=routing.settings.policy,
            temperature=routing.settings.temperature,
            workers=[self._routed(info) for _, info in sorted(self._discovery.workers().items())],
            index=router_pb2.IndexStats(
                blocks=stats["held"],
                workers=self._feed.live_holders(),
                bytes=stats["bytes"],
                gaps_total=self._feed.gaps_total,
                divergences_total=self._feed.divergences_total,
                forgotten_total=stats["forgotten"],
            ),
            holders=self._feed.holders(),
            leases=routing.live,
            leases_expired_total=sum(model.selector.expired for model in routing.models.values()),
            held=routing.held,
            bus_connected=self._bus.connected,
            replica_id=self.replicas.me,
            lease_digest=self._digest(),
            replicas=self.replicas.state(),
        )

    def select(self, request: router_pb2.SelectRequest) -> router_pb2.SelectResponse:
        return self.routing.select(request.route)

    def report(self, request: router_pb2.ReportRequest) -> router_pb2.ReportResponse:
        return router_pb2.ReportResponse(unknown_lease_ids=self.routing.leases.report(request.reports))

    def _digest(self) -> router_pb2.LeaseDigest:
        own, foreign = list(self.routing.leases), self.replicas.leases()
        speculated = [model.selector.speculated for model in self.routing.models.values()]
        return router_pb2.LeaseDigest(
            leases=len(own) + len(foreign),
            lease_sum=(sum(own) + sum(foreign)) % 2**64,
            speculative_blocks=sum(blocks for blocks, _ in speculated),
            speculative_sum=sum(of for _, of in speculated) % 2**64,
        )

    def _routed(self, info: WorkerInfo) -> router_pb2.RoutedWorker:
        model = self.routing.models.get(info.model.name)
        requests, _, queued, blocks = model.slots(info.id) if model else (0, 0, 0, 0)
        return router_pb2.RoutedWorker(
            info=info,
            leases=requests,
            queued_prefill_tokens=queued,
            active_blocks=blocks,
            indexed_blocks=self._feed.blocks_of(info.id),
        )

    def _on_members(self) -> None:
        if self._generation == self._discovery.generation:
            return
        self._generation = self._discovery.generation
        self._workers.clear()
        for info in self._discovery.workers().values():
            self._workers.labels(_name(Role, info.role), _name(WorkerState, info.state)).inc()


def _name(enum: Any, value: int) -> str:
    """An enum value as people write it: ROLE_PREFILL is `prefill`, WORKER_STATE_READY `ready`."""
    return enum.Name(value).rpartition("_")[2].lower()
