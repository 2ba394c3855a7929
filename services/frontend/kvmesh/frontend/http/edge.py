"""What surrounds every HTTP request: its id, its span, its metrics, and the last word on failures."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable
from functools import cache

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvmesh.common import metrics
from kvmesh.common.errors import KvmeshError
from kvmesh.common.telemetry import span
from kvmesh.frontend.serving.call import new_request_id
from kvmesh.frontend.serving.failures import failure
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
# nginx's status for a client that left before its answer began.
_CLIENT_GONE = 499


class Edge:
    """Pure ASGI, outermost: nothing but one wrapped `send` stays on a token's way."""

    def __init__(self, app: ASGIApp, endpoints: frozenset[str]) -> None:
        """`endpoints`: the paths metrics know by name; all others are one."""
        self._app = app
        self._endpoints = endpoints
        measured = metrics.frontend()
        # To find a label's metric costs more than to count.
        self._in_flight = cache(measured.in_flight.labels)
        self._requests = cache(measured.requests.labels)
        self._duration = cache(measured.duration.labels)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            # What a GET would say of itself: the server, which has the first, sends no body.
            scope = {**scope, "method": "GET"}
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = new_request_id().encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        status = _CLIENT_GONE
        begun = time.perf_counter()

        def send_with_id(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                took = b"%d" % ((time.perf_counter() - begun) * 1000)
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id),
                    (b"openai-processing-ms", took),
                ]
            return send(message)

        endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
        in_flight = self._in_flight(endpoint)
        in_flight.inc()
        try:
            parent = headers.get(b"traceparent", b"").decode("latin-1")
            with span(f"{scope['method']} {endpoint}", parent, request_id=scope["state"]["request_id"]):
                try:
                    await self._app(scope, receive, send_with_id)
                except Exception:
                    log.exception("request failed", request_id=request_id.decode(), endpoint=endpoint)
                    if status != _CLIENT_GONE:
                        # The answer has begun: a broken connection is all that is left to say.
                        raise
                    why = "internal error; the log has it by the request id"
                    error = KvmeshError(ErrorCode.ERROR_CODE_INTERNAL, why)
                    await failure(scope, error)(scope, receive, send_with_id)
        finally:
            in_flight.dec()
            self._requests(endpoint, status).inc()
            self._duration(endpoint).observe(time.perf_counter() - begun)
