"""A response sent to its client, streamed or whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import orjson
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvmesh.common import metrics
from kvmesh.frontend.http.client_watch import ClientWatch
from kvmesh.frontend.routes.answer import ignored_header

log = structlog.get_logger()

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies in front must not collect chunks.
    (b"x-accel-buffering", b"no"),
]


class EventsResponse(Response):
    """A stream of events, which ends when its client leaves. An error before the first is raised."""

    def __init__(
        self, frames: AsyncGenerator[bytes], ignored: Sequence[str] = (), deadline: float | None = None
    ) -> None:
        """`deadline`: of what generates them, where that waits for its client; of `time.monotonic`."""
        super().__init__()
        self._frames = frames
        self._ignored = ignored
        self._deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ClientWatch(scope, self._deadline) as watch:
            async with aclosing(self._frames) as frames:
                await self._send(frames, send)
        if watch.gone:
            metrics.frontend().disconnects.inc()
            log.info("client left", request_id=scope["state"]["request_id"])

    async def _send(self, frames: AsyncGenerator[bytes], send: Send) -> None:
        frame = await anext(frames, None)
        headers = [*_HEADERS, *ignored_header(self._ignored)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while frame is not None:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
            frame = await anext(frames, None)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class WholeResponse(Response):
    """Generates when it is sent: errors become a status of their own."""

    def __init__(
        self, result: Coroutine[Any, Any, dict[str, Any]], request_id: str, ignored: Sequence[str]
    ) -> None:
        """`result` is awaited while its client is there."""
        super().__init__()
        self._result = result
        self._request_id = request_id
        self._ignored = ignored

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ClientWatch(scope) as watch:
            content = orjson.dumps(await self._result)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(content)),
                *ignored_header(self._ignored),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": content})
        if watch.gone:
            metrics.frontend().disconnects.inc()
            log.info("client left", request_id=self._request_id)
