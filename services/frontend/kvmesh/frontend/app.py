"""The OpenAI gateway as an ASGI application: routes, and every failure in OpenAI's error shape."""

from __future__ import annotations

import math

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.edge import Edge
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.routes import chat, completions, health, models
from kvmesh.frontend.shortcut import Shortcut
from kvmesh.v1.errors_pb2 import ErrorCode

_ENDPOINTS = frozenset(
    ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/ready", "/metrics")
)
_LOADED = {
    "/v1/chat/completions": chat.create_chat_completion,
    "/v1/completions": completions.create_completion,
}
_UNAVAILABLE = 503


def build_app(gateway: Gateway) -> ASGIApp:
    """The application; it needs no lifespan, as the gateway's parts are started elsewhere."""
    app = FastAPI(
        title="kvmesh",
        description="Large language models behind one OpenAI endpoint",
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.gateway = gateway
    app.add_exception_handler(KvmeshError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    for part in (chat, completions, models, health):
        app.include_router(part.router)
    return Edge(Shortcut(app, _LOADED, _answer_error), _ENDPOINTS)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, KvmeshError)
    status = error.spec.http
    headers = {}
    retry_after_ms = error.retry_after_ms or (1_000 if status == _UNAVAILABLE else 0)
    if retry_after_ms:
        headers = {
            "retry-after": str(math.ceil(retry_after_ms / 1000)),
            # What OpenAI clients look at first.
            "retry-after-ms": str(retry_after_ms),
        }
    return JSONResponse(error.to_openai(), status, headers)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """What Starlette itself answers: no such path, no such method."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 405:
        known = KvmeshError(
            ErrorCode.ERROR_CODE_METHOD_NOT_ALLOWED,
            f"{method} is not allowed on {path}; use {(error.headers or {}).get('Allow', 'another method')}",
        )
    elif error.status_code == 404:
        known = KvmeshError(ErrorCode.ERROR_CODE_NOT_FOUND, f"there is no {method} {path}; see /docs")
    else:
        known = KvmeshError(ErrorCode.ERROR_CODE_INVALID_ARGUMENT, str(error.detail).lower())
    return JSONResponse(known.to_openai(), error.status_code, error.headers)
