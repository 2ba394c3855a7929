"""The life of a role's process: `run` its main coroutine; inside, a `RoleServer` from start to stop."""

from __future__ import annotations

import asyncio
import gc
import sys
import tempfile
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any

import grpc
import structlog
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvmesh.common import metrics, telemetry
from kvmesh.common.config import Config, Listen
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.server import OPTIONS, ServerInterceptor
from kvmesh.common.grpc.streams import Accept, AcceptCall, StreamHub
from kvmesh.common.http import StatusServer
from kvmesh.common.signals import StopSignal
from kvmesh.common.tls import MeshTls
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

# Seconds the answers of a drained server's last calls have to leave.
FLUSH_S = 0.25

# Objects beyond those freed between two collections of the youngest generation. A request makes a few
# hundred; by Python's own 700 most collections would look at requests that are still alive.
_YOUNG_OBJECTS = 20_000

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_stop_signal: ContextVar[StopSignal | None] = ContextVar("kvmesh_stop_signal", default=None)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a process's main coroutine on uvloop, then exit.

    Exit codes: 0 after an orderly stop, 1 with one line on stderr after a KvmeshError. SIGTERM and SIGINT end
    `RoleServer.wait_for_stop`; before it is awaited they cancel `main`. A second one kills at once.
    """

    async def supervised() -> None:
        task = asyncio.current_task()
        assert task is not None
        stop = StopSignal(task)
        _stop_signal.set(stop)
        stop.install()
        try:
            await main()
        except asyncio.CancelledError:
            if not stop.asked:
                raise

    try:
        uvloop.run(supervised())
    except KvmeshError as error:
        print(f"kvmesh {telemetry.role()}: {error.message}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    finally:
        telemetry.shutdown()


class RoleServer:
    """One process's gRPC server with health and reflection, and its HTTP server of metrics and health.

    Order: `add_service`, `start`, `set_ready`, `wait_for_stop`, `stop`. Must be made inside the event loop.
    """

    def __init__(self, role: str, config: Config, listen: Listen) -> None:
        self._role = role
        self._listen = listen
        self._section = _section_of(config, listen) or role
        self._services: list[str] = []
        self._ready = self._was_ready = self._stopped = False
        self._interceptor = ServerInterceptor(role)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue] - stubs lack it
        self._updates: set[asyncio.Task[None]] = set()
        self._http = StatusServer(lambda: self._ready)
        self._streams: dict[str, Accept] = {}
        self._unary: dict[str, AcceptCall] = {}
        self._hub: StreamHub | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._tls = MeshTls.of(config.tls)
        self.server = grpc.aio.server(interceptors=[self._interceptor], options=OPTIONS)
        self.port = 0
        self.metrics_port = 0

    @property
    def address(self) -> str:
        """host:port other roles reach this one by; after `start`."""
        return f"{self._listen.advertised_host()}:{self.port}"

    def add_stream(self, full_name: str, method: str, accept: Accept) -> None:
        """Serve one streaming method of `full_name` off the data plane (`kvmesh.common.grpc.streams`)."""
        self._streams[f"/{full_name}/{method}"] = accept
        if full_name not in self._services:
            self._services.append(full_name)

    def add_unary(self, full_name: str, method: str, accept: AcceptCall) -> None:
        """Serve one unary method of `full_name` off the data plane. The same method of its `add_service`
        takes the calls whose messages are compressed."""
        self._unary[f"/{full_name}/{method}"] = accept

    def add_service(self, full_name: str, add: Callable[[Any, grpc.aio.Server], None], servicer: Any) -> None:
        """Serve `full_name`, e.g. "kvmesh.v1.RouterService", by the generated `add_..._to_server`."""
        add(servicer, self.server)
        if full_name not in self._services:
            self._services.append(full_name)

    async def start(self) -> None:
        """Bind and serve, not ready yet. Raises KvmeshError(UNAVAILABLE) naming a taken port and its key."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        if self._listen.reflection:
            names = [*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, self.server)
        host = self._listen.host or "0.0.0.0"
        try:
            self.port = self._bind(host, self._listen.port)
        except (OSError, RuntimeError):
            self._unbind()
            raise self._taken("port", self._listen.port) from None
        try:
            self.metrics_port = await self._http.start(host, self._listen.metrics_port)
        except OSError:
            await self._http.stop()
            self._unbind()
            raise self._taken("metrics_port", self._listen.metrics_port) from None
        await self._health.set("", _SERVING)
        for name in self._services:
            await self._health.set(name, _NOT_SERVING)
        await self.server.start()
        if self._tls is not None:
            self._tls.watch()
        log.info("listening", address=self.address, metrics_port=self.metrics_port)

    def set_ready(self, ready: bool) -> None:
        """Say in gRPC health (under the services' names) and /ready whether calls are welcome."""
        if ready == self._ready:
            return
        self._ready = ready
        log.info("ready" if ready else "not ready")
        if ready and not self._was_ready and _stop_signal.get() is not None:
            # The process is ours (`run`), and what its start made has been made.
            _forget_startup()
        self._was_ready |= ready
        for name in self._services:
            update = asyncio.create_task(self._health.set(name, _SERVING if ready else _NOT_SERVING))
            self._updates.add(update)
            update.add_done_callback(self._updates.discard)

    async def wait_for_stop(self) -> None:
        """Return once SIGTERM or SIGINT has come; a second one ends the process at once."""
        stop = _stop_signal.get()
        if stop is not None:
            await stop.wait()
            return
        # Not under `run`: take the signals for as long as this waits.
        stop = StopSignal()
        stop.install()
        try:
            await stop.wait()
        finally:
            stop.uninstall()

    async def stop(self, drain_s: float) -> None:
        """Refuse new calls, wait at most `drain_s` seconds for running ones, cancel the rest. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        self._ready = False
        if self._updates:
            await asyncio.gather(*self._updates)
        await self._health.enter_graceful_shutdown()
        # Not left to grpc's own grace, which would wait for health watchers that never hang up.
        draining = [self._interceptor.drain(drain_s)]
        if self._hub is not None:
            draining.append(self._hub.drain(drain_s))
        drained = all(await asyncio.gather(*draining))
        # What the last calls answered must still reach the wire.
        await self.server.stop(FLUSH_S if drained else None)
        if self._hub is not None:
            await self._hub.drained(FLUSH_S)
        self._unbind()
        if self._tls is not None:
            await self._tls.close()
        await self._http.stop()

    def _bind(self, host: str, port: int) -> int:
        """Listen; returns the port. With a data plane, grpc's own server is behind it, on a unix socket."""
        if not self._streams and not self._unary:
            if self._tls is None:
                return self.server.add_insecure_port(_join(host, port))
            return self.server.add_secure_port(_join(host, port), self._tls.server_credentials())
        self._directory = tempfile.TemporaryDirectory(prefix="kvmesh-")
        socket = f"{self._directory.name}/grpc"
        self.server.add_insecure_port(f"unix:{socket}")
        self._hub = StreamHub(metrics.rpc(self._role), self._tls)
        return self._hub.serve(host, port, self._streams, socket, self._unary)

    def _unbind(self) -> None:
        hub, self._hub = self._hub, None
        if hub is not None:
            hub.close()
        if self._directory is not None:
            self._directory.cleanup()

    def _taken(self, key: str, port: int) -> KvmeshError:
        return KvmeshError(
            ErrorCode.ERROR_CODE_UNAVAILABLE,
            f"cannot listen on {self._listen.host}:{port}: the port is taken or not allowed; "
            f"set `{self._section}.{key}` to another one",
        )


def _forget_startup() -> None:
    """Modules and what else is there by now live as long as the process: no collection need look at them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])


def _section_of(config: Config, listen: Listen) -> str:
    """The configuration key that holds `listen`."""
    return next((name for name in type(config).model_fields if getattr(config, name) is listen), "")


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
