"""Failures in Anthropic's shape. The codes are the one table's; the types follow from the HTTP status."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

from kvmesh.common.errors import KvmeshError
from kvmesh.v1.errors_pb2 import ErrorCode

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}
_SERVER_ERRORS = 500
_UNAVAILABLE = 503


def error_json(error: KvmeshError, request_id: str) -> dict[str, Any]:
    """`param` and `code` are beyond Anthropic's: what OpenAI's clients are told, too."""
    status = error.spec.http
    kind = _TYPES.get(status, "api_error" if status >= _SERVER_ERRORS else "invalid_request_error")
    if error.code in (ErrorCode.ERROR_CODE_OVERLOADED, ErrorCode.ERROR_CODE_NO_WORKER_READY):
        kind = "overloaded_error"
    said = {
        "type": kind,
        "message": error.message,
        "param": error.param,
        "code": error.spec.openai_code,
    }
    return {"type": "error", "error": said, "request_id": request_id}


def error_response(error: KvmeshError, request_id: str) -> JSONResponse:
    status = error.spec.http
    headers = {"request-id": request_id}
    retry_after_ms = error.retry_after_ms or (1_000 if status == _UNAVAILABLE else 0)
    if retry_after_ms:
        headers["retry-after"] = str(math.ceil(retry_after_ms / 1000))
        headers["retry-after-ms"] = str(retry_after_ms)
    headers["x-should-retry"] = "true" if error.retryable else "false"
    return JSONResponse(error_json(error, request_id), status, headers)
