"""A plain request's way through the server: read at once, its answer written with nothing to find out.

What httptools and uvicorn do for any request is left out, header by header and in callbacks as it is.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Message
from uvicorn._types import HTTPScope
from uvicorn.protocols.http.httptools_impl import (
    HEADER_VALUE_RE,
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from kvmesh.core import read_plain_request
from kvmesh.frontend.protocol.plain import PlainBody

_END = b"0\r\n\r\n"
# Longer bodies are read in parts, so that others are not held up.
_MOST_BODY_BYTES = 262_144
# A body that comes later than this behind its headers is waited for by the parser.
_HOLD_S = 0.05


class PlainProtocol(HttpToolsProtocol):
    """uvicorn's protocol, but for plain requests, which its parser does not see."""

    max_header_bytes: int
    max_body_bytes: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.in_head = False
        """whether the parser has a part of a request's line and headers"""
        # Of what was written past the application's `send`, in the loop's time.
        self.written_at = 0.0
        # The beginning of what may be a plain request, and how many bytes it lacks.
        self._held: list[bytes] = []
        self._missing = 0
        self._held_timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        if self._held:
            self._held.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            data = self._let_go()
        if not (self._is_between_requests() and self._take(data)):
            self.parse(data)

    def parse(self, data: bytes) -> None:
        """What is, or may be, no plain request."""
        super().data_received(data)

    def start_plain(self, path: str, headers: list[tuple[bytes, bytes]], body: PlainBody) -> None:
        """Let the application answer."""
        self._unset_keepalive_if_required()
        self.url = raw_path = path.encode()
        scope: Any = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": "1.1",
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme or "http",
            "root_path": self.root_path,
            "method": "POST",
            "path": path,
            "raw_path": raw_path,
            "query_string": b"",
            "headers": headers,
            "state": {**self.app_state, "connection": self, "plain": body},
        }
        self.scope = scope
        self.cycle = PlainCycle(self, scope)
        app: Any = self.app
        self._start_asgi_task(self.cycle, app)

    def shutdown(self) -> None:
        """The server ends: what has begun to come is still answered."""
        self._parse_held()
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._let_go()
        super().connection_lost(exc)

    def _is_between_requests(self) -> bool:
        """Whether what comes now begins a request, and nothing is to be answered before it."""
        if self.in_head or self.pipeline or self.transport.is_closing():
            return False
        return self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)

    def _take(self, data: bytes) -> bool:
        """Start a plain request, all of `data`, or hold what lacks its end. False: it is neither."""
        most = min(self.max_body_bytes, _MOST_BODY_BYTES)
        found = read_plain_request(data, self.max_header_bytes, most)
        if found is None:
            return False
        if isinstance(found, int):
            # Many clients send a body by itself, right behind its headers.
            self._held, self._missing = [data], found
            self._held_timer = self.loop.call_later(_HOLD_S, self._parse_held)
            return True
        path, headers, fields, tokens = found
        self.start_plain(path, headers, PlainBody(fields, tokens))
        return True

    def _let_go(self) -> bytes:
        """What is held, which then is not."""
        data, self._held = b"".join(self._held), []
        if self._held_timer is not None:
            self._held_timer.cancel()
            self._held_timer = None
        return data

    def _parse_held(self) -> None:
        """What is late has its time from now on, as that of any other request."""
        if self._held:
            self.parse(self._let_go())


class PlainCycle(RequestResponseCycle):
    """The answer to a request whose body is there, on a connection that stays open behind it.

    What is sent in one turn of the loop leaves together: a system call costs as much as making a chunk does.
    """

    def __init__(self, connection: PlainProtocol, scope: HTTPScope) -> None:
        super().__init__(
            scope=scope,
            transport=connection.transport,
            flow=connection.flow,
            logger=connection.logger,
            access_logger=connection.access_logger,
            access_log=False,
            default_headers=connection.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=True,
            on_response=connection.on_response_complete,
        )
        self.more_body = False
        self._connection = connection
        self._unsent: list[bytes] = []

    async def send(self, message: Message) -> None:  # type: ignore[override]
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if not self.response_started:
            self._add_head(message)
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if not self.chunked_encoding:
            self._unsent.append(body)
        elif body:
            self.add_chunk(body)
        if more:
            return
        if self.chunked_encoding:
            self._unsent.append(_END)
        self._flush()
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()

    def add_chunk(self, chunk: bytes) -> None:
        """The next bytes of an answer in chunks, at least one."""
        if not self._unsent:
            self._connection.loop.call_soon(self._flush)
        self._unsent.append(b"%x\r\n%b\r\n" % (len(chunk), chunk))

    def _add_head(self, message: Message) -> None:
        """A body follows at once."""
        self.response_started = True
        self.chunked_encoding = True
        head = [STATUS_LINE[message["status"]]]
        headers = [*self.default_headers, *message["headers"]]
        if HEADER_VALUE_RE.search(b"".join([value for _, value in headers])):
            raise RuntimeError("a header's value would end its line")
        for name, value in headers:
            if name == b"content-length":
                self.chunked_encoding = False
            head += (name, b": ", value, b"\r\n")
        if self.chunked_encoding:
            head.append(b"transfer-encoding: chunked\r\n")
        if not self.keep_alive:
            # Asked to end while the request was answered.
            head.append(b"connection: close\r\n")
        head.append(b"\r\n")
        self._connection.loop.call_soon(self._flush)
        self._unsent += head

    def _flush(self) -> None:
        if self._unsent and not self.disconnected:
            self.transport.write(b"".join(self._unsent))
            self._connection.written_at = self._connection.loop.time()
        self._unsent = []
