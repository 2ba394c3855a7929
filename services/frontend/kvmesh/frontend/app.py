"""The gateway as an ASGI application: routes, and every failure in the shape that a path's clients read."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.http.edge import Edge
from kvmesh.frontend.http.keep_alive import KeepAlive
from kvmesh.frontend.http.shortcut import Shortcut
from kvmesh.frontend.routes import (
    chat,
    completions,
    embeddings,
    health,
    messages,
    models,
    responses,
    stored_chats,
    tokenize,
)
from kvmesh.frontend.serving.failures import failure
from kvmesh.frontend.tenants.gate import Gate
from kvmesh.v1.errors_pb2 import ErrorCode

_ENDPOINTS = frozenset(
    (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/tokenize",
        "/v1/detokenize",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/responses",
        "/v1/responses/compact",
        "/v1/responses/input_tokens",
        "/health",
        "/ready",
        "/metrics",
    )
)
_PARTS = (chat, stored_chats, completions, embeddings, messages, responses, tokenize, models, health)
_LOADED = {
    "/v1/chat/completions": chat.create_chat_completion,
    "/v1/completions": completions.create_completion,
    "/v1/embeddings": embeddings.create_embeddings,
    "/v1/messages": messages.create_message,
    "/v1/responses": responses.create_response,
    "/v1/responses/compact": responses.compact_conversation,
}
# Headers that pages of other origins may read.
_EXPOSED = (
    "x-request-id",
    "openai-processing-ms",
    "retry-after",
    "retry-after-ms",
    "x-kvmesh-ignored-params",
    *(
        f"x-ratelimit-{what}-{of}"
        for of in ("requests", "tokens")
        for what in ("limit", "remaining", "reset")
    ),
)


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
    for part in _PARTS:
        app.include_router(part.router)
    inner: ASGIApp = Shortcut(app, _LOADED, _answer_error)
    if gateway.tenants is not None and gateway.tenants.required:
        inner = Gate(inner, gateway.tenants)
    config = gateway.config
    if config.keepalive_s:
        inner = KeepAlive(inner, config.keepalive_s)
    if config.cors.origins:
        # Outside of the gate: a browser asks for permission without its key.
        inner = CORSMiddleware(
            inner,
            allow_origins=config.cors.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=config.cors.headers,
            allow_credentials=config.cors.credentials,
            expose_headers=_EXPOSED,
            max_age=config.cors.max_age_s,
        )
    return Edge(inner, _ENDPOINTS)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, KvmeshError)
    return failure(request.scope, error)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """What Starlette itself answers: no such path, no such method."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = allowed = ", ".join(_methods(request))
        known = KvmeshError(
            ErrorCode.ERROR_CODE_METHOD_NOT_ALLOWED, f"{method} is not allowed on {path}; use {allowed}"
        )
    elif error.status_code == 404:
        known = KvmeshError(ErrorCode.ERROR_CODE_NOT_FOUND, f"there is no {method} {path}; see /docs")
    else:
        known = KvmeshError(ErrorCode.ERROR_CODE_INVALID_ARGUMENT, str(error.detail).lower())
    response = failure(request.scope, known)
    response.status_code = error.status_code
    response.headers.update(headers)
    return response


def _methods(request: Request) -> list[str]:
    """Those that a path is served by; Starlette names the first route's only."""
    routes = [
        route
        for part in _PARTS
        for route in part.router.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
    ]
    methods = {method for route in routes for method in route.methods or ()}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)
