"""The error table is total, and an error survives the way through a real gRPC call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import pytest
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from kvmesh.common.config import Config
from kvmesh.common.errors import BARE_STATUS, TABLE, KvmeshError, invalid
from kvmesh.common.grpc.client import Channels
from kvmesh.common.grpc.trailers import STATUS_METADATA_KEY, rich_status
from kvmesh.common.lifecycle import RoleServer
from kvmesh.v1 import errors_pb2
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import RouteRequest, RouteResponse
from kvmesh.v1.router_pb2_grpc import (
    RouterServiceServicer,
    RouterServiceStub,
    add_RouterServiceServicer_to_server,
)

CODES: list[Any] = [value for value in ErrorCode.values() if value]


def test_table_is_total() -> None:
    assert set(TABLE) == set(CODES)


def test_every_bare_status_means_something() -> None:
    assert set(BARE_STATUS) == set(grpc.StatusCode)
    assert set(BARE_STATUS.values()) <= set(TABLE)


@pytest.mark.parametrize("code", CODES, ids=ErrorCode.Name)
def test_http_status_and_openai_body(code: Any) -> None:
    error = KvmeshError(code, "what happened", param="model")
    assert 400 <= error.spec.http <= 599
    assert error.spec.grpc is not grpc.StatusCode.OK
    assert error.to_openai() == {
        "error": {
            "message": "what happened",
            "type": error.spec.openai_type,
            "param": "model",
            "code": error.spec.openai_code,
        }
    }


@pytest.mark.parametrize("code", CODES, ids=ErrorCode.Name)
def test_proto_round_trip(code: Any) -> None:
    error = KvmeshError(code, "naïve", param="n", retry_after_ms=7, retryable=not TABLE[code].retryable)
    again = KvmeshError.from_proto(error.to_proto())
    assert (again.code, again.message, again.param, again.retry_after_ms, again.retryable) == (
        code,
        "naïve",
        "n",
        7,
        error.retryable,
    )


def test_a_code_of_a_later_version_is_internal() -> None:
    message = errors_pb2.Error(message="new")
    message.MergeFromString(errors_pb2.Error.FromString(b"\x08\x99\x07").SerializeToString())
    assert message.code == 921
    assert KvmeshError.from_proto(message).code == ErrorCode.ERROR_CODE_INTERNAL


def test_garbage_is_not_an_error_message() -> None:
    with pytest.raises(DecodeError):
        errors_pb2.Error.FromString(b"\xff\xff")


class Failing(RouterServiceServicer):
    """Fails each call with the code that the request names."""

    async def Route(self, request: RouteRequest, context: grpc.aio.ServicerContext) -> RouteResponse:
        if request.model == "bug":
            raise ZeroDivisionError("a secret")
        if request.model == "abort":
            await context.abort(grpc.StatusCode.DATA_LOSS, "bare")
        raise KvmeshError(
            cast(ErrorCode, ErrorCode.Value(request.model)),
            "zu groß: größer",
            param="prompt",
            retry_after_ms=1500,
        )


@pytest.fixture
async def stub() -> AsyncIterator[RouterServiceStub]:
    config = Config()
    config.router.port = config.router.metrics_port = 0
    server = RoleServer("router", config, config.router)
    server.add_service("kvmesh.v1.RouterService", add_RouterServiceServicer_to_server, Failing())
    await server.start()
    channels = Channels()
    yield RouterServiceStub(channels.get(server.address))
    await channels.close()
    await server.stop(0)


async def call(stub: RouterServiceStub, what: str) -> KvmeshError:
    with pytest.raises(grpc.RpcError) as caught:
        await stub.Route(RouteRequest(model=what))
    return KvmeshError.from_rpc(caught.value, "router at x")


@pytest.mark.parametrize("code", CODES, ids=ErrorCode.Name)
async def test_every_code_crosses_a_real_call(stub: RouterServiceStub, code: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        await stub.Route(RouteRequest(model=ErrorCode.Name(code)))
    assert isinstance(caught.value, grpc.aio.AioRpcError)
    assert caught.value.code() is TABLE[code].grpc
    error = KvmeshError.from_rpc(caught.value, "router at x")
    assert error.code == code
    assert error.message == "zu groß: größer"
    assert (error.param, error.retry_after_ms) == ("prompt", 1500)


async def test_a_failed_call_has_the_richer_status_too(stub: RouterServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Route(RouteRequest(model="ERROR_CODE_CONTEXT_LENGTH_EXCEEDED"))
    trailers = {str(key): value for key, value in caught.value.trailing_metadata()}
    status = Status.FromString(cast(bytes, trailers[STATUS_METADATA_KEY]))
    assert (status.code, status.message) == (caught.value.code().value[0], caught.value.details())
    info, request, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for detail, packed in zip((info, request, retry), status.details, strict=True):
        assert packed.Unpack(detail)
    assert (info.reason, info.domain) == ("CONTEXT_LENGTH_EXCEEDED", "kvmesh")
    assert [violation.field for violation in request.field_violations] == ["prompt"]
    assert retry.retry_delay.ToMilliseconds() == 1500
    assert len(rich_status(KvmeshError(ErrorCode.ERROR_CODE_INTERNAL, "x")).details) == 1


async def test_an_unexpected_exception_tells_the_caller_nothing(stub: RouterServiceStub) -> None:
    error = await call(stub, "bug")
    assert error.code == ErrorCode.ERROR_CODE_INTERNAL
    assert "secret" not in error.message
    assert "ZeroDivision" not in error.message


async def test_a_bare_status_names_the_peer(stub: RouterServiceStub) -> None:
    error = await call(stub, "abort")
    assert error.code == ErrorCode.ERROR_CODE_DATA_CORRUPTED
    assert error.message == "router at x: bare"


async def test_a_dead_peer_is_unavailable() -> None:
    channels = Channels()
    error = await call(RouterServiceStub(channels.get("127.0.0.1:1")), "x")
    await channels.close()
    assert error.code == ErrorCode.ERROR_CODE_UNAVAILABLE
    assert error.retryable


def test_invalid_names_the_parameter() -> None:
    assert invalid("must be positive", "n").param == "n"
