"""The one table of kvmesh errors: code <-> gRPC status <-> HTTP status <-> OpenAI type and code.

Every failure that leaves a process is a `KvmeshError`. Servers turn it into a gRPC status with the
`kvmesh.v1.Error` message in the trailing metadata, the gateway into an OpenAI error body; clients
turn either back into the same `KvmeshError`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import grpc
import grpc.aio

from kvmesh.v1 import errors_pb2
from kvmesh.v1.errors_pb2 import ErrorCode

ERROR_METADATA_KEY = "kvmesh-error-bin"


class ErrorSpec(NamedTuple):
    """How one code looks on each wire."""

    grpc: grpc.StatusCode
    http: int
    openai_type: str
    openai_code: str | None
    # The same request may succeed when sent again, perhaps elsewhere.
    retryable: bool


_S = grpc.StatusCode
_CLIENT = "invalid_request_error"
_SERVER = "server_error"

TABLE: dict[ErrorCode, ErrorSpec] = {
    ErrorCode.ERROR_CODE_INVALID_ARGUMENT: ErrorSpec(
        _S.INVALID_ARGUMENT, 400, _CLIENT, "invalid_value", False
    ),
    ErrorCode.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED: ErrorSpec(
        _S.OUT_OF_RANGE, 400, _CLIENT, "context_length_exceeded", False
    ),
    ErrorCode.ERROR_CODE_MODEL_NOT_FOUND: ErrorSpec(_S.NOT_FOUND, 404, _CLIENT, "model_not_found", False),
    ErrorCode.ERROR_CODE_NOT_FOUND: ErrorSpec(_S.NOT_FOUND, 404, _CLIENT, "not_found", False),
    ErrorCode.ERROR_CODE_METHOD_NOT_ALLOWED: ErrorSpec(
        _S.UNIMPLEMENTED, 405, _CLIENT, "method_not_allowed", False
    ),
    ErrorCode.ERROR_CODE_PAYLOAD_TOO_LARGE: ErrorSpec(
        _S.INVALID_ARGUMENT, 413, _CLIENT, "payload_too_large", False
    ),
    ErrorCode.ERROR_CODE_UNSUPPORTED_MEDIA_TYPE: ErrorSpec(
        _S.INVALID_ARGUMENT, 415, _CLIENT, "unsupported_content_type", False
    ),
    ErrorCode.ERROR_CODE_HEADERS_TOO_LARGE: ErrorSpec(
        _S.INVALID_ARGUMENT, 431, _CLIENT, "headers_too_large", False
    ),
    ErrorCode.ERROR_CODE_REQUEST_TIMEOUT: ErrorSpec(
        _S.DEADLINE_EXCEEDED, 408, "timeout_error", "request_timeout", True
    ),
    ErrorCode.ERROR_CODE_UNSUPPORTED: ErrorSpec(
        _S.UNIMPLEMENTED, 400, _CLIENT, "unsupported_parameter", False
    ),
    ErrorCode.ERROR_CODE_UNAUTHENTICATED: ErrorSpec(
        _S.UNAUTHENTICATED, 401, "authentication_error", "invalid_api_key", False
    ),
    ErrorCode.ERROR_CODE_PERMISSION_DENIED: ErrorSpec(
        _S.PERMISSION_DENIED, 403, "permission_error", "permission_denied", False
    ),
    ErrorCode.ERROR_CODE_RATE_LIMITED: ErrorSpec(
        _S.RESOURCE_EXHAUSTED, 429, "rate_limit_error", "rate_limit_exceeded", True
    ),
    ErrorCode.ERROR_CODE_QUOTA_EXHAUSTED: ErrorSpec(
        _S.RESOURCE_EXHAUSTED, 429, "insufficient_quota", "insufficient_quota", False
    ),
    ErrorCode.ERROR_CODE_OVERLOADED: ErrorSpec(_S.RESOURCE_EXHAUSTED, 503, _SERVER, "overloaded", True),
    ErrorCode.ERROR_CODE_NO_WORKER_READY: ErrorSpec(_S.UNAVAILABLE, 503, _SERVER, "no_worker_ready", True),
    ErrorCode.ERROR_CODE_UNAVAILABLE: ErrorSpec(_S.UNAVAILABLE, 503, _SERVER, "unavailable", True),
    ErrorCode.ERROR_CODE_WORKER_LOST: ErrorSpec(_S.UNAVAILABLE, 502, _SERVER, "worker_lost", True),
    ErrorCode.ERROR_CODE_WRONG_ROLE: ErrorSpec(_S.FAILED_PRECONDITION, 503, _SERVER, "wrong_role", True),
    ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED: ErrorSpec(
        _S.DEADLINE_EXCEEDED, 504, "timeout_error", "deadline_exceeded", True
    ),
    # 499 is nginx's status for a client that closed the request; nobody is left to read it.
    ErrorCode.ERROR_CODE_CANCELLED: ErrorSpec(_S.CANCELLED, 499, _CLIENT, "cancelled", False),
    ErrorCode.ERROR_CODE_ENGINE_FAILED: ErrorSpec(_S.INTERNAL, 500, _SERVER, "engine_failed", True),
    ErrorCode.ERROR_CODE_DATA_CORRUPTED: ErrorSpec(_S.DATA_LOSS, 500, _SERVER, "data_corrupted", True),
    ErrorCode.ERROR_CODE_INTERNAL: ErrorSpec(_S.INTERNAL, 500, _SERVER, "internal_error", False),
}

# What a bare gRPC status means when no kvmesh error came with it (the peer died, a proxy answered).
BARE_STATUS: dict[grpc.StatusCode, ErrorCode] = {
    _S.OK: ErrorCode.ERROR_CODE_INTERNAL,
    _S.CANCELLED: ErrorCode.ERROR_CODE_CANCELLED,
    _S.UNKNOWN: ErrorCode.ERROR_CODE_INTERNAL,
    _S.INVALID_ARGUMENT: ErrorCode.ERROR_CODE_INVALID_ARGUMENT,
    _S.DEADLINE_EXCEEDED: ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED,
    _S.NOT_FOUND: ErrorCode.ERROR_CODE_NOT_FOUND,
    _S.ALREADY_EXISTS: ErrorCode.ERROR_CODE_INVALID_ARGUMENT,
    _S.PERMISSION_DENIED: ErrorCode.ERROR_CODE_PERMISSION_DENIED,
    _S.UNAUTHENTICATED: ErrorCode.ERROR_CODE_UNAUTHENTICATED,
    _S.RESOURCE_EXHAUSTED: ErrorCode.ERROR_CODE_OVERLOADED,
    _S.FAILED_PRECONDITION: ErrorCode.ERROR_CODE_UNAVAILABLE,
    _S.ABORTED: ErrorCode.ERROR_CODE_UNAVAILABLE,
    _S.UNIMPLEMENTED: ErrorCode.ERROR_CODE_UNSUPPORTED,
    _S.OUT_OF_RANGE: ErrorCode.ERROR_CODE_INVALID_ARGUMENT,
    _S.INTERNAL: ErrorCode.ERROR_CODE_INTERNAL,
    _S.UNAVAILABLE: ErrorCode.ERROR_CODE_UNAVAILABLE,
    _S.DATA_LOSS: ErrorCode.ERROR_CODE_DATA_CORRUPTED,
}


class KvmeshError(Exception):
    """A failure with a code from the table.

    `message` is lowercase, has no final full stop, and says what to do where something can be done.
    `param` is the request field at fault, in the client's words. `retry_after_ms` of 0 means no advice.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        param: str | None = None,
        retry_after_ms: int = 0,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_ms = retry_after_ms
        self.retryable = TABLE[code].retryable if retryable is None else retryable

    @property
    def spec(self) -> ErrorSpec:
        return TABLE[self.code]

    def __repr__(self) -> str:
        return f"KvmeshError({ErrorCode.Name(self.code)}, {self.message!r})"

    def to_proto(self) -> errors_pb2.Error:
        return errors_pb2.Error(
            code=self.code,
            message=self.message,
            param=self.param or "",
            retryable=self.retryable,
            retry_after_ms=self.retry_after_ms,
        )

    @classmethod
    def from_proto(cls, error: errors_pb2.Error) -> KvmeshError:
        """The error a message carries; a code this build does not know becomes INTERNAL."""
        code = error.code if error.code in TABLE else ErrorCode.ERROR_CODE_INTERNAL
        return cls(
            code,
            error.message,
            param=error.param or None,
            retry_after_ms=error.retry_after_ms,
            retryable=error.retryable,
        )

    @classmethod
    def from_rpc(cls, error: grpc.RpcError, what: str) -> KvmeshError:
        """The error behind a failed call; `what` names the peer where the peer said nothing itself."""
        # grpc's asyncio errors offer what `grpc.Call` does, without being one.
        call = error if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None
        if call is None:
            return cls(BARE_STATUS[_S.UNKNOWN], f"{what}: {error}")
        carried = carried_error(call.trailing_metadata() or ())
        return carried or cls(
            BARE_STATUS[call.code()], f"{what}: {call.details() or call.code().name.lower()}"
        )

    def to_openai(self) -> dict[str, dict[str, object]]:
        """The body OpenAI clients parse."""
        return {
            "error": {
                "message": self.message,
                "type": self.spec.openai_type,
                "param": self.param,
                "code": self.spec.openai_code,
            }
        }


def carried_error(metadata: Iterable[tuple[str, str | bytes]]) -> KvmeshError | None:
    """The error that came with a status, in its trailing metadata, where a kvmesh server sent it."""
    for key, value in metadata:
        if key == ERROR_METADATA_KEY and isinstance(value, bytes):
            return KvmeshError.from_proto(errors_pb2.Error.FromString(value))
    return None


def invalid(message: str, param: str | None = None) -> KvmeshError:
    """A request field with an unusable value."""
    return KvmeshError(ErrorCode.ERROR_CODE_INVALID_ARGUMENT, message, param=param)
