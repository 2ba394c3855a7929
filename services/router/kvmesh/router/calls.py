"""Route, Select and Report as unary calls: as often as requests come from callers that keep no stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.grpc.streams import AcceptCall, Call, CallHandler
from kvmesh.router.routing import Routing
from kvmesh.v1.router_pb2 import RouteRequest, RouteResponse

Asked = TypeVar("Asked", bound=Message)


def read(kind: type[Asked], message: bytes) -> Asked:
    """Raises KvmeshError(INVALID_ARGUMENT) where it is none."""
    try:
        return kind.FromString(message)
    except DecodeError:
        raise invalid(f"the message is not a {kind.DESCRIPTOR.name}") from None


class RouteCall(CallHandler):
    """Places one request. A caller that leaves before it is answered leaves nothing behind."""

    def __init__(self, call: Call, routing: Routing) -> None:
        self._call = call
        self._routing = routing
        self._number = 0
        self._lease = 0

    def on_message(self, message: bytes) -> None:
        self._number = self._routing.submit(read(RouteRequest, message), self._answer)

    def on_closed(self, error: KvmeshError | None) -> None:
        if error is not None and not self._routing.cancel(self._number) and self._lease:
            self._routing.leases.end(self._lease)

    def _answer(self, result: RouteResponse | KvmeshError) -> None:
        if isinstance(result, KvmeshError):
            self._call.fail(result)
            return
        self._lease = result.lease.id
        self._call.answer(result.SerializeToString())


class AnsweredCall(CallHandler):
    """Is answered at once, by a function."""

    def __init__(self, call: Call, kind: type[Asked], answer: Callable[[Asked], Message]) -> None:
        self._call = call
        self._kind = kind
        self._answer = answer

    def on_message(self, message: bytes) -> None:
        self._call.answer(self._answer(read(self._kind, message)).SerializeToString())


def answered(kind: type[Asked], answer: Callable[[Asked], Message]) -> AcceptCall:
    """Serves a method by a function, whose KvmeshErrors its callers get."""
    return lambda call: AnsweredCall(call, kind, answer)
