"""Uvicorn as a part of the process: its loop, its signals and its lifetime are ours."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import structlog
import uvicorn
from starlette.types import ASGIApp

from kvmesh.common.config import FrontendConfig
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.http.protocol import bounded_protocol
from kvmesh.frontend.http.tls import Certificate
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

# Longer than the idle time after which clients and proxies close by themselves.
_KEEP_ALIVE_S = 75
_BACKLOG = 2048
# libuv accepts one connection for each listening handle in a turn of the loop. A turn is long while requests
# keep the loop busy: with one handle, those who have been accepted would be served many times before the last
# of a burst is served at all. More handles cost each lone connection an accept in vain.
_HANDLES = 16


class HttpServer:
    """Serves one application. `start`, then `stop` once."""

    def __init__(self, app: ASGIApp, config: FrontendConfig) -> None:
        """Raises KvmeshError(INVALID_ARGUMENT) where its certificate cannot be used."""
        self._host = config.host
        self._wanted_port = config.http_port
        self._shared = config.processes > 1
        certificate = self._certificate = Certificate(config.tls) if config.tls.cert else None
        self._config = uvicorn.Config(
            app,
            loop="none",
            ssl_context_factory=(lambda *_: certificate.context) if certificate is not None else None,
            http=bounded_protocol(
                config.max_header_bytes,
                config.max_body_bytes,
                config.header_timeout_s,
                config.write_timeout_s,
                _KEEP_ALIVE_S,
            ),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            # Who the client is, behind a proxy, nobody asks.
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            backlog=_BACKLOG,
        )
        self._server = _Server(self._config)
        self._task: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        """Bind and serve. Raises KvmeshError(UNAVAILABLE) naming a taken port and its key."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self._shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            listener.bind((self._host, self._wanted_port))
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            place, why = f"{self._host}:{self._wanted_port}", (error.strerror or str(error)).lower()
            raise KvmeshError(
                ErrorCode.ERROR_CODE_UNAVAILABLE,
                f"cannot listen on {place}: {why}; set `frontend.http_port` to another port",
            ) from None
        self.port = listener.getsockname()[1]
        if self._certificate is not None:
            self._certificate.start()
        listeners = [listener, *(listener.dup() for _ in range(_HANDLES - 1))]
        self._task = asyncio.create_task(self._server.serve(sockets=listeners), name="http-server")
        await self._server.listening.wait()
        log.info("http listening", address=f"{self._host}:{self.port}")

    async def stop(self, drain_s: float) -> None:
        """Accept nothing new; live requests have `drain_s` seconds, then they are cancelled. Idempotent."""
        if self._task is not None:
            self._config.timeout_graceful_shutdown = drain_s  # pyright: ignore[reportAttributeAccessIssue]
            self._server.should_exit = True
            await self._task
        if self._certificate is not None:
            await self._certificate.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the role's to handle."""
        yield
