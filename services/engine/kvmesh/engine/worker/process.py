"""A worker's process: one engine, served, registered, its KV events published, from start to drain."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict

import structlog

from kvmesh.common import metrics
from kvmesh.common.bus import Bus
from kvmesh.common.config import Config
from kvmesh.common.discovery import make_discovery
from kvmesh.common.errors import KvmeshError
from kvmesh.common.events.source import PublicationServicer
from kvmesh.common.lifecycle import RoleServer
from kvmesh.engine.contract import Engine, EngineInfo, Probe, Role
from kvmesh.engine.model import resolve_model
from kvmesh.engine.registry import make_engine
from kvmesh.engine.worker.parity import prove_parity
from kvmesh.engine.worker.publisher import KvPublisher
from kvmesh.engine.worker.registration import Registration, worker_id
from kvmesh.engine.worker.service import WorkerServicer, refuse_other_role
from kvmesh.engine.worker.streams import Streams
from kvmesh.engine.worker.translation import named_events
from kvmesh.v1.engine_pb2_grpc import add_WorkerServiceServicer_to_server
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.events_pb2_grpc import add_EventServiceServicer_to_server

log = structlog.get_logger()

# Adds the role's own service to a server.
AddService = Callable[[RoleServer, Streams], None]


class WorkerProcess:
    """Serves and registers itself as STARTING at once, as READY when the engine answers.

    `run` returns after an orderly stop and raises KvmeshError when the engine cannot start or dies, so that
    a supervisor starts the process again. NATS may be away at any time; who knows the address is served.
    """

    def __init__(self, config: Config, role: Role, add_service: AddService) -> None:
        self._config = config
        self._role = role
        self._add_service = add_service
        self._metrics = metrics.worker(role.value)
        self._id = worker_id(config, role)
        # Later starts have larger ones.
        self._incarnation = time.time_ns()
        self._engine: Engine | None = None
        self._streams = Streams(self._metrics)
        self._registration = Registration(config, role, self._id, self._incarnation, self._metrics)

    async def run(self) -> None:
        config = self._config
        bus = Bus.of(config, self._id)
        server = RoleServer(self._role.value, config, config.worker)
        publisher = KvPublisher(bus, self._id, self._incarnation, config.node, self._metrics)
        discovery = make_discovery(config, bus)
        self._add_services(server, publisher)
        async with contextlib.AsyncExitStack() as cleanup:
            cleanup.push_async_callback(bus.close)
            await bus.start()
            cleanup.push_async_callback(server.stop, 1.0)
            await server.start()
            self._registration.listening(server.address)
            cleanup.push_async_callback(discovery.close)
            await discovery.register(self._registration.info)

            engine, info = await self._start_engine(cleanup)
            cleanup.push_async_callback(publisher.close)
            events = asyncio.create_task(publisher.follow(named_events(engine, info)), name="kv-events")
            cleanup.callback(events.cancel)
            server.set_ready(True)
            await discovery.register(self._registration.info)

            failure = await self._until_stopped(server, engine, events)
            server.set_ready(False)
            if failure is not None:
                # Nothing here can be finished: leave at once, so that callers go elsewhere.
                await discovery.deregister()
                self._streams.abort_all(failure)
                await engine.close()
                await self._streams.drain(0.0)
                raise failure
            self._registration.draining()
            await discovery.register(self._registration.info)
            log.info("draining", requests=self._streams.live)
            cut_off = await self._streams.drain(config.workers.drain_s)
            if cut_off:
                log.warning("requests cut off at shutdown", requests=cut_off, after_s=config.workers.drain_s)

    def _add_services(self, server: RoleServer, publisher: KvPublisher) -> None:
        self._add_service(server, self._streams)
        server.add_service(
            "kvmesh.v1.WorkerService",
            add_WorkerServiceServicer_to_server,
            WorkerServicer(self._registration, self._flush_cache),
        )
        server.add_service(
            "kvmesh.v1.EventService",
            add_EventServiceServicer_to_server,
            PublicationServicer(publisher.publication),
        )
        refuse_other_role(self._role, server.server)

    async def _start_engine(self, cleanup: contextlib.AsyncExitStack) -> tuple[Engine, EngineInfo]:
        config = self._config
        model = await asyncio.to_thread(resolve_model, config)
        # What clients call the model is what its blocks are kept under.
        named = config.model.model_copy(update={"name": model.name})
        engine = make_engine(
            config.model_copy(update={"model": named}),
            self._role,
            model_path=model.path,
            worker_id=self._id,
            bootstrap_host=config.worker.advertised_host(),
            kvbm_socket=config.kvbm_socket(),
        )
        cleanup.push_async_callback(engine.close)
        began = time.monotonic()
        info = await engine.start()
        if not info.embedding_size:
            # A vector's prompt is asked for once: nobody routes by what is left of it.
            await prove_parity(engine, info, config.engine.page_size)
        log.info(
            "engine started",
            worker=self._id,
            engine=config.engine.kind,
            model=model.name,
            blocks=info.total_blocks,
            page_size=info.page_size,
            seconds=round(time.monotonic() - began, 2),
        )
        self._engine = engine
        self._registration.ready(engine, info, model, await self._probe(engine))
        self._streams.open(engine)
        return engine, info

    async def _probe(self, engine: Engine) -> Probe:
        if not self._config.engine.probe:
            return Probe()
        began = time.monotonic()
        probe = await engine.probe()
        log.info("engine measured", **asdict(probe), seconds=round(time.monotonic() - began, 2))
        return probe

    async def _until_stopped(
        self, server: RoleServer, engine: Engine, events: asyncio.Task[None]
    ) -> KvmeshError | None:
        """Wait for a stop signal (None) or for what makes going on useless."""
        stop = asyncio.create_task(server.wait_for_stop())
        death = asyncio.create_task(engine.failed())
        try:
            await asyncio.wait({stop, death, events}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                return None
            if death.done():
                return death.result()
            # Routers would go on with an index that no event corrects any more.
            reason = events.exception() or "their stream ended"
            return KvmeshError(
                ErrorCode.ERROR_CODE_ENGINE_FAILED, f"the engine's KV events stopped: {reason}"
            )
        finally:
            for task in (stop, death):
                task.cancel()
            await asyncio.gather(stop, death, return_exceptions=True)

    async def _flush_cache(self) -> None:
        if self._engine is None:
            raise KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, "the worker is starting; try again")
        await self._engine.flush_cache()
