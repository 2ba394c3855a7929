"""A failure as an HTTP response: the body that the path's clients read, and when to try again."""

from __future__ import annotations

import math

from starlette.responses import JSONResponse
from starlette.types import Scope

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.anthropic import errors as anthropic
from kvmesh.frontend.serving.call import new_request_id

_UNAVAILABLE = 503
_UNAUTHORIZED = 401
_TOO_MANY = 429
_UNREADABLE = 415
# What a body may be.
_READ_HERE = {"accept-encoding": "identity", "accept-post": "application/json"}
# Whose clients read Anthropic's errors.
_MESSAGES = "/v1/messages"


def failure(scope: Scope, error: KvmeshError) -> JSONResponse:
    """An HTTP request's failure, also one before what gives the request its id."""
    path: str = scope["path"]
    if path == _MESSAGES or path.startswith(f"{_MESSAGES}/"):
        state = scope.get("state", {})
        response = anthropic.error_response(error, state.get("request_id") or new_request_id())
    else:
        response = _openai(error)
    if response.status_code == _UNREADABLE:
        response.headers.update(_READ_HERE)
    return response


def _openai(error: KvmeshError) -> JSONResponse:
    status = error.spec.http
    headers = {}
    retry_after_ms = error.retry_after_ms or (1_000 if status == _UNAVAILABLE else 0)
    if retry_after_ms:
        headers = {
            "retry-after": str(math.ceil(retry_after_ms / 1000)),
            # What OpenAI clients look at first.
            "retry-after-ms": str(retry_after_ms),
        }
    if status == _TOO_MANY and not error.retryable:
        # OpenAI clients would send every 429 again, soon.
        headers["x-should-retry"] = "false"
    if status == _UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.to_openai(), status, headers)
