"""HTTP/1.1 by uvicorn and httptools, with bounds on what a client may take before its request is known.

httptools collects a header until it is whole, however long it gets, and uvicorn waits for one for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.serving.failures import failure
from kvmesh.v1.errors_pb2 import ErrorCode


def bounded_protocol(max_header_bytes: int, header_timeout_s: float, idle_s: float) -> type[asyncio.Protocol]:
    """The protocol of one server. A request's line and headers have `header_timeout_s` from their first byte,
    a new connection `idle_s` for that byte."""

    class Bounded(_BoundedProtocol):
        _max_header_bytes = max_header_bytes
        _header_timeout_s = header_timeout_s
        _idle_s = idle_s

    return Bounded


class _BoundedProtocol(HttpToolsProtocol):
    _max_header_bytes: int
    _header_timeout_s: float
    _idle_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._on_lost: Callable[[], object] | None = None

    # What a request's endpoint may ask (`client_watch.Connection`).

    def when_lost(self, callback: Callable[[], object] | None) -> None:
        self._on_lost = callback
        if callback is not None and self.cycle.disconnected:
            self.loop.call_soon(self._tell_lost)

    def has_body(self) -> bool:
        return not self.cycle.more_body

    def _tell_lost(self) -> None:
        if self._on_lost is not None:
            self._on_lost()

    # What the transport and the parser call.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self._idle_s, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        if self.cycle is not None and self.cycle.disconnected:
            self._tell_lost()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self._max_header_bytes:
                self._refuse(self._too_large())
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(self._header_timeout_s, self._on_timeout)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self._stop_timer()
        self.scope["state"]["connection"] = self  # type: ignore[typeddict-item]

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size <= self._max_header_bytes:
            super().on_headers_complete()
            return
        app, self.app = self.app, _refusing(self._too_large())  # type: ignore[assignment]
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, in the shape of everything else."""
        self._refuse(KvmeshError(ErrorCode.ERROR_CODE_INVALID_ARGUMENT, "the request is not valid HTTP/1.1"))

    def _on_timeout(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            # A pipelined request's beginning; the answer before it goes first.
            self._head_timer = self.loop.call_later(self._header_timeout_s, self._on_timeout)
            return
        self._refuse(
            KvmeshError(
                ErrorCode.ERROR_CODE_REQUEST_TIMEOUT,
                f"the request's headers were not complete within {self._header_timeout_s:g} s; send it again",
            )
        )

    def _too_large(self) -> KvmeshError:
        return KvmeshError(
            ErrorCode.ERROR_CODE_HEADERS_TOO_LARGE,
            f"the request's headers exceed {self._max_header_bytes} bytes; send less",
        )

    def _refuse(self, error: KvmeshError) -> None:
        """Answer without the application, and close: what follows on this connection cannot be understood."""
        self._in_head = False
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            # As far as it has come.
            path = self.url.partition(b"?")[0].decode("latin-1")
            response = _closing(failure({"path": path}, error))
            head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
            self.transport.write(STATUS_LINE[response.status_code] + head + b"\r\n" + response.body)
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _refusing(error: KvmeshError) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await _closing(failure(scope, error))(scope, receive, send)

    return app


def _closing(response: Response) -> Response:
    response.headers["connection"] = "close"
    return response
