"""Comments in a quiet stream of server-sent events, so that proxies and clients do not take it for dead."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvmesh.frontend.http.client_watch import Connection

_COMMENT = b": keep-alive\n\n"
# Looks in the time after which a comment is due: it is late by one of them at most.
_LOOKS = 10


class KeepAlive:
    """ASGI. Every body message of an event stream must end an event, as a comment may follow any of them.

    One timer looks at all streams, while there are any. Belongs to one event loop.
    """

    def __init__(self, app: ASGIApp, after_s: float) -> None:
        """A comment is sent after each `after_s` seconds in which nothing else was."""
        self._app = app
        self._after_s = after_s
        self._streams: set[_Stream] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if "plain" in scope["state"]:
            # Its connection knows when anything was written, and whether the answer is one in chunks.
            stream = self._watch(scope)
            try:
                await self._app(scope, receive, send)
            finally:
                self._streams.discard(stream)
            return
        await self._watch_events(scope, receive, send)

    async def _watch_events(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream: _Stream | None = None

        def send_watched(message: Message) -> Awaitable[None]:
            nonlocal stream
            if stream is not None:
                stream.said()
            elif message["type"] == "http.response.start" and _is_event_stream(message["headers"]):
                stream = self._watch(scope)
            return send(message)

        try:
            await self._app(scope, receive, send_watched)
        finally:
            if stream is not None:
                self._streams.discard(stream)

    def _watch(self, scope: Scope) -> _Stream:
        stream = _Stream(scope)
        self._streams.add(stream)
        if self._timer is None:
            self._look_soon(stream.loop)
        return stream

    def _look_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self._after_s / _LOOKS, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        since = loop.time() - self._after_s
        for stream in self._streams:
            stream.comment(since)
        if self._streams:
            self._look_soon(loop)


class _Stream:
    __slots__ = ("_connection", "_said_at", "_scope", "loop")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._connection: Connection = scope["state"]["connection"]
        self.loop = asyncio.get_running_loop()
        self.said()

    def said(self) -> None:
        """The application says something."""
        self._said_at = self.loop.time()

    def comment(self, since: float) -> None:
        """Unless something was said since then; a reader that is behind needs none, nor one that has all."""
        quiet = max(self._said_at, self._connection.written_at) <= since
        if quiet and self._connection.can_write(self._scope):
            self._connection.write(_COMMENT)


def _is_event_stream(headers: Any) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)
