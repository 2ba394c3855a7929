"""Answers of unknown length to clients of HTTP/1.0, which know no chunks: they end with their connection."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def unchunked(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """`app` for the only request of a connection, whose answer `cycle` writes."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        def send_plain(message: Any) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                if all(name.lower() != b"content-length" for name, _ in message["headers"]):
                    cycle.chunked_encoding = False
            elif cycle.expected_content_length == 0:
                # As long as it turns out to be.
                cycle.expected_content_length = len(message.get("body", b""))
            return send(message)

        await app(scope, receive, send_plain)

    return run
