"""The endpoints that carry the load, reached without the framework's layers.

Through FastAPI a request passes eight layers on its way in and each of its chunks five on the way out, which
costs more CPU than all the frontend does for it (`benchmarks/gateway.py`). They parse, validate and answer
by themselves, so nothing is lost; the framework still lists them at /docs and answers other methods.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from kvmesh.common.errors import KvmeshError

Endpoint = Callable[[Request], Awaitable[Response]]
OnError = Callable[[Request, Exception], Awaitable[Response]]


class Shortcut:
    """Before `app`: a POST to one of `endpoints`, by path, goes there; all else goes on to `app`."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Endpoint], on_error: OnError) -> None:
        """`on_error` answers a KvmeshError that was raised before the answer began."""
        self._app = app
        self._endpoints = endpoints
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = None
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(scope["path"])
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        scope["app"] = self._app
        request = Request(scope, receive)
        try:
            response = await endpoint(request)
            await response(scope, receive, send)
        except KvmeshError as error:
            response = await self._on_error(request, error)
            await response(scope, receive, send)
