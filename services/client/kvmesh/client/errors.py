"""What a frontend answers instead of what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from kvmesh.v1.errors_pb2 import Error, ErrorCode

_ERROR_METADATA_KEY = "kvmesh-error-bin"


class RequestError(Exception):
    """A request that failed, with all that the server said of it."""

    def __init__(self, status: grpc.StatusCode, error: Error) -> None:
        super().__init__(error.message)
        self.status = status
        """the gRPC status"""
        self.code = ErrorCode.Name(error.code).removeprefix("ERROR_CODE_").lower()
        """kvmesh's name for it, e.g. `model_not_found`; `unspecified` where no frontend has answered"""
        self.message = error.message
        self.param = error.param
        """the field at fault; may be empty"""
        self.retryable = error.retryable
        """whether the same request may succeed if it is sent again"""
        self.retry_after_s = error.retry_after_ms / 1000
        """0: no advice"""

    @classmethod
    def of(cls, failure: Any) -> RequestError:
        """Of a failed call of grpc's."""
        for key, value in failure.trailing_metadata() or ():
            if key == _ERROR_METADATA_KEY:
                try:
                    return cls(failure.code(), Error.FromString(value))
                except DecodeError:
                    break
        status = failure.code()
        retryable = status is grpc.StatusCode.UNAVAILABLE
        return cls(status, Error(message=failure.details() or status.name.lower(), retryable=retryable))


@contextmanager
def request_errors() -> Iterator[None]:
    """Around calls of stubs."""
    try:
        yield
    except grpc.RpcError as failure:
        raise RequestError.of(failure) from None
