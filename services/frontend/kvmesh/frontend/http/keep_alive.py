"""Comments in a quiet stream of server-sent events, so that proxies and clients do not take it for dead."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvmesh.frontend.http.client_watch import Connection

_COMMENT = b": keep-alive\n\n"


class KeepAlive:
    """ASGI. Every body message of an event stream must end an event, as a comment may follow any of them."""

    def __init__(self, app: ASGIApp, after_s: float) -> None:
        """A comment is sent after each `after_s` seconds in which nothing else was."""
        self._app = app
        self._after_s = after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stream: _Stream | None = None

        async def send_watched(message: Message) -> None:
            nonlocal stream
            if stream is not None:
                await stream.send(message)
                return
            await send(message)
            if message["type"] == "http.response.start" and _is_event_stream(message["headers"]):
                stream = _Stream(send, self._after_s, scope["state"]["connection"])

        try:
            await self._app(scope, receive, send_watched)
        finally:
            if stream is not None:
                stream.close()


class _Stream:
    def __init__(self, send: Send, after_s: float, connection: Connection) -> None:
        self._send = send
        self._connection = connection
        self._after_s = after_s
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()
        # The application's or a comment's; a reader that is slow needs no comment.
        self._sending = False
        self._comment: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(after_s, self._look)

    async def send(self, message: Message) -> None:
        if self._comment is not None and not self._comment.done():
            await asyncio.wait([self._comment])
        self._sending = True
        try:
            await self._send(message)
        finally:
            self._sending = False
            self._sent_at = self._loop.time()
        if not message.get("more_body", False):
            self.close()

    def close(self) -> None:
        self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()

    def _look(self) -> None:
        left = max(self._sent_at, self._connection.written_at) + self._after_s - self._loop.time()
        if left <= 0 and not self._sending:
            self._comment = self._loop.create_task(self._say())
            left = self._after_s
        self._timer = self._loop.call_later(max(left, self._after_s / 10), self._look)

    async def _say(self) -> None:
        self._sent_at = self._loop.time()
        await self._send({"type": "http.response.body", "body": _COMMENT, "more_body": True})


def _is_event_stream(headers: Any) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)
