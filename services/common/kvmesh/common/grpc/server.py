"""What every kvmesh gRPC server does around its handlers.

One interceptor: a KvmeshError becomes its status with its trailers; anything
else unexpected is logged here and leaves as a bare INTERNAL; the caller's `traceparent` becomes the parent of
the RPC's span; RPCs are counted and timed; headers of streams go out before their first message, which
grpc would otherwise hold them back for.

Cancellation, deadlines and lost connections reach a handler as asyncio.CancelledError; one that is reading
its caller's stream may see the stream end instead, just as if the caller had hung up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from inspect import isasyncgenfunction
from typing import Any

import grpc
import structlog

from kvmesh.common import metrics
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.trailers import error_trailers
from kvmesh.common.telemetry import span
from kvmesh.common.trace import TRACEPARENT
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

MAX_MESSAGE_BYTES = 64 << 20

OPTIONS: list[tuple[str, int]] = [
    # Without this a second process binds the same port unnoticed and takes half of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Callers ping idle connections under a live stream; the default would punish them with GOAWAY.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
]

# Infrastructure that monitors call for ever; neither traced nor waited for at shutdown.
_QUIET = ("/grpc.health.", "/grpc.reflection.")

_Behaviour = Callable[[Any, Any], Any]


class ServerInterceptor(grpc.aio.ServerInterceptor):
    """Install one per server."""

    def __init__(self, role: str) -> None:
        self._metrics = metrics.rpc(role)
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}
        self._draining = False
        self._live = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Refuse RPCs from now on, health and reflection excepted; true if the running ones ended in time."""
        self._draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return handler
            wrapped = handler if method.startswith(_QUIET) else self._wrap(method, handler)
            self._wrapped[method] = wrapped
        return wrapped

    def _wrap(self, method: str, handler: Any) -> grpc.RpcMethodHandler:
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), **codec)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._unary(method, handler.stream_unary), **codec)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream), **codec)
        return grpc.stream_stream_rpc_method_handler(self._stream(method, handler.stream_stream), **codec)

    def _unary(self, method: str, behaviour: _Behaviour) -> _Behaviour:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._rpc(method, context):
                return await behaviour(request, context)

        return call

    def _stream(self, method: str, behaviour: _Behaviour) -> _Behaviour:
        generator = isasyncgenfunction(behaviour)

        async def call(request: Any, context: grpc.aio.ServicerContext) -> None:
            async with self._rpc(method, context):
                await context.send_initial_metadata(())
                if not generator:
                    await behaviour(request, context)
                    return
                # Written here, not yielded on: a cancellation while a message is being sent then
                # closes the generator at once, and its cleanup runs inside this RPC.
                async with aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        await context.write(response)

        return call

    @asynccontextmanager
    async def _rpc(self, method: str, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        started = time.perf_counter()
        in_flight = self._metrics.in_flight_of(method)
        in_flight.inc()
        self._live += 1
        self._idle.clear()
        code = grpc.StatusCode.OK
        try:
            with span(method, parent=_traceparent(context)):
                try:
                    if self._draining:
                        raise shutting_down()
                    yield
                except KvmeshError as error:
                    code = error.spec.grpc
                    await context.abort(code, error.message, tuple(error_trailers(error)))
                except grpc.aio.AbortError:
                    code = _abort_code(context)
                    raise
                except asyncio.CancelledError:
                    code = grpc.StatusCode.CANCELLED
                    raise
                except grpc.aio.InternalError:
                    # A message could not be sent: the caller has gone, its cancellation is on the way.
                    code = grpc.StatusCode.CANCELLED
                    raise asyncio.CancelledError from None
                except Exception:
                    code = grpc.StatusCode.INTERNAL
                    log.exception("rpc failed", method=method)
                    await context.abort(code, "internal error; see the server's log")
        finally:
            self._live -= 1
            if not self._live:
                self._idle.set()
            in_flight.dec()
            self._metrics.ended_as(method, code.name).inc()
            self._metrics.duration_of(method).observe(time.perf_counter() - started)


def shutting_down() -> KvmeshError:
    """What a server that drains says to calls."""
    return KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, "shutting down; use another one")


def _traceparent(context: grpc.aio.ServicerContext) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == TRACEPARENT and isinstance(value, str):
            return value
    return ""


def _abort_code(context: Any) -> grpc.StatusCode:
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next((status for status in grpc.StatusCode if status.value[0] == code), grpc.StatusCode.UNKNOWN)
