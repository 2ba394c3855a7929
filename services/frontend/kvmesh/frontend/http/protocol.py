"""HTTP/1.1 by uvicorn and httptools, with bounds on what a client may take before its request is known, and
on how long its answer waits for it.

httptools collects a header until it is whole, however long it gets, and uvicorn waits for ever: for a header,
and for who does not read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.http.plain import PlainCycle, PlainProtocol
from kvmesh.frontend.http.unchunked import unchunked
from kvmesh.frontend.protocol.plain import PlainBody
from kvmesh.frontend.serving.failures import failure
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

# Of an answer that its client is behind with, so many are kept as bytes, and the rest as token ids, which are
# far fewer.
_MOST_UNTAKEN_BYTES = 16_384


def bounded_protocol(
    most_header_bytes: int,
    most_body_bytes: int,
    header_timeout_s: float,
    write_timeout_s: float,
    idle_s: float,
) -> type[asyncio.Protocol]:
    """The protocol of one server. A request's line and headers have `header_timeout_s` from their first byte,
    a new connection `idle_s` for that byte. A client that is behind, or has the rest of its answer still to
    take, must take some of it every `write_timeout_s`. Larger bodies than `most_body_bytes` are the
    application's to refuse.
    """

    class Bounded(_BoundedProtocol):
        max_header_bytes = most_header_bytes
        max_body_bytes = most_body_bytes
        _header_timeout_s = header_timeout_s
        _write_timeout_s = write_timeout_s
        _idle_s = idle_s

    return Bounded


class _BoundedProtocol(PlainProtocol):
    _header_timeout_s: float
    _write_timeout_s: float
    _idle_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._on_lost: Callable[[], object] | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        # Bytes that were left to take when that was set.
        self._untaken = 0

    # What a request's endpoint may ask (`client_watch.Connection`).

    def when_lost(self, callback: Callable[[], object] | None) -> None:
        self._on_lost = callback
        if callback is not None and not self.pipeline:
            # A large body's last part stops the reading, and who does not read does not hear of the end.
            self.flow.resume_reading()
        if callback is not None and self.cycle.disconnected:
            self.loop.call_soon(self._tell_lost)

    def has_body(self) -> bool:
        return not self.cycle.more_body

    def can_write(self, scope: Scope) -> bool:
        cycle = self.cycle
        return bool(
            # Another request may have come behind it.
            cycle.scope is scope
            and cycle.response_started
            and cycle.chunked_encoding
            and not (cycle.response_complete or cycle.disconnected or self.flow.write_paused)
        )

    def write(self, chunk: bytes) -> None:
        if isinstance(self.cycle, PlainCycle):
            self.cycle.add_chunk(chunk)
            return
        self.written_at = self.loop.time()
        self.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))

    def cut_off_if_behind(self) -> bool:
        behind = self.flow.write_paused
        if behind:
            self._cut_off()
        return behind

    def _tell_lost(self) -> None:
        if self._on_lost is not None:
            self._on_lost()

    # What the transport and the parser call.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(_MOST_UNTAKEN_BYTES)
        self._head_timer = self.loop.call_later(self._idle_s, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)
        if self.cycle is not None and self.cycle.disconnected:
            self._tell_lost()

    def parse(self, data: bytes) -> None:
        super().parse(data)
        if self.in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self.max_header_bytes:
                self._refuse(self._too_large())
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(self._header_timeout_s, self._on_timeout)

    def start_plain(self, path: str, headers: list[tuple[bytes, bytes]], body: PlainBody) -> None:
        self._stop_timer()
        super().start_plain(path, headers, body)
        self._watch_reader()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.in_head = True
        self._head_bytes = 0
        self._stop_timer()
        self.scope["state"]["connection"] = self  # type: ignore[typeddict-item]

    def on_headers_complete(self) -> None:
        self.in_head = False
        self._stop_timer()
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size <= self.max_header_bytes:
            super().on_headers_complete()
            self._watch_reader()
            return
        app, self.app = self.app, _refusing(self._too_large())  # type: ignore[assignment]
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = unchunked(app, cycle)
        super()._start_asgi_task(cycle, app)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch_reader()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()

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

    def _watch_reader(self) -> None:
        """From now on, where bytes are left to take and none are added, the client has its time for one."""
        self._stop_write_timer()
        self._untaken = self.transport.get_write_buffer_size()
        if self._untaken and (self.flow.write_paused or self.cycle.response_complete):
            self._write_timer = self.loop.call_later(self._write_timeout_s, self._look_at_reader)

    def _look_at_reader(self) -> None:
        if self.transport.get_write_buffer_size() < self._untaken:
            self._watch_reader()
        else:
            self._cut_off()

    def _cut_off(self) -> None:
        log.info("client cut off: it does not read", client=self.client, untaken_bytes=self._untaken)
        self.transport.abort()

    def _too_large(self) -> KvmeshError:
        return KvmeshError(
            ErrorCode.ERROR_CODE_HEADERS_TOO_LARGE,
            f"the request's headers exceed {self.max_header_bytes} bytes; send less",
        )

    def _refuse(self, error: KvmeshError) -> None:
        """Answer without the application, and close: what follows on this connection cannot be understood."""
        self.in_head = False
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or self._is_unanswered():
            # As far as it has come.
            path = self.url.partition(b"?")[0].decode("latin-1")
            response = _closing(failure({"path": path}, error))
            head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
            self.transport.write(STATUS_LINE[response.status_code] + head + b"\r\n" + response.body)
            if self.cycle is not None:
                # Nobody else answers from here on.
                self.cycle.disconnected = True
        self.transport.close()

    def _is_unanswered(self) -> bool:
        """Whether the request whose body is on its way is the one in hand, and its answer has not begun."""
        return not self.pipeline and self.cycle.more_body and not self.cycle.response_started

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def _refusing(error: KvmeshError) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await _closing(failure(scope, error))(scope, receive, send)

    return app


def _closing(response: Response) -> Response:
    response.headers["connection"] = "close"
    return response
