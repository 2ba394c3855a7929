"""RouteStream: one caller's routes and reports on one stream; answers come as decisions are made."""

from __future__ import annotations

import asyncio
from collections import deque

import structlog

from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.streams import Stream
from kvmesh.common.telemetry import span
from kvmesh.router.calls import read
from kvmesh.router.routing import Routing
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import (
    Held,
    NumberedRoute,
    RouteResponse,
    RouteStreamRequest,
    RouteStreamResponse,
)

log = structlog.get_logger()

# Bytes of answers that a caller may leave unread.
MAX_UNREAD = 16 << 20
# A caller is told that its request waits once it has done so for this long.
HELD_S = 0.5


class RouteStream:
    """The handler of one stream."""

    def __init__(self, stream: Stream, routing: Routing) -> None:
        self._stream = stream
        self._routing = routing
        # Routes without an answer: the routing's numbers by the caller's.
        self._waiting: dict[int, int] = {}
        # When to say of a route that it waits.
        self._untold: deque[tuple[float, int]] = deque()
        self._telling: asyncio.TimerHandle | None = None
        # Given out here and not reported as ended.
        self._leases: set[int] = set()
        # Made in this turn of the loop, sent at its end.
        self._message = RouteStreamResponse()
        self._half_closed = False
        # Sent since the caller fell behind; None while it keeps up.
        self._unread: int | None = None

    def on_message(self, message: bytes) -> None:
        request = read(RouteStreamRequest, message)
        # Ends free what the routes may take.
        if request.reports:
            self._routing.leases.report(request.reports)
            self._leases.difference_update(report.lease_id for report in request.reports if report.ended)
        for number in request.cancels:
            if number in self._waiting:
                self._routing.cancel(self._waiting.pop(number))
        for asked in request.routes:
            self._submit(asked)

    def on_half_close(self) -> None:
        """What still waits is answered before the end."""
        self._half_closed = True
        self._end_when_answered()

    def on_writable(self) -> None:
        self._unread = None

    def on_closed(self, error: KvmeshError | None) -> None:
        """Nobody is left to answer. Leases live on for a while: their holder may come back."""
        for number in self._waiting.values():
            self._routing.cancel(number)
        self._waiting.clear()
        # Nobody heard of these.
        for answer in self._message.answers:
            if answer.HasField("response"):
                self._leases.discard(answer.response.lease.id)
                self._routing.leases.end(answer.response.lease.id)
        self._message.Clear()
        self._routing.leases.orphan(self._leases)
        self._leases.clear()
        if self._telling is not None:
            self._telling.cancel()

    def _submit(self, asked: NumberedRoute) -> None:
        """A failure, whatever it is, is this request's alone: the stream carries all of its caller's."""

        def answer(result: RouteResponse | KvmeshError) -> None:
            self._waiting.pop(asked.number, None)
            self._answer(asked.number, result)

        try:
            with span("route", parent=asked.traceparent, request_id=asked.route.request_id):
                number = self._routing.submit(asked.route, answer)
        except KvmeshError as refusal:
            answer(refusal)
        except Exception:
            log.exception("decision failed", request_id=asked.route.request_id)
            answer(KvmeshError(ErrorCode.ERROR_CODE_INTERNAL, "internal error; see the router's log"))
        else:
            if self._routing.waits(number):
                self._waiting[asked.number] = number
                self._tell_later(asked.number)

    def _answer(self, number: int, result: RouteResponse | KvmeshError | Held) -> None:
        answers = self._message.answers
        if not answers:
            asyncio.get_running_loop().call_soon(self._send)
        if isinstance(result, KvmeshError):
            answers.add(number=number, error=result.to_proto())
        elif isinstance(result, Held):
            answers.add(number=number, held=result)
        else:
            answers.add(number=number, response=result)
            self._leases.add(result.lease.id)

    def _send(self) -> None:
        if not self._message.answers:
            return
        message = self._message.SerializeToString()
        self._message.Clear()
        if not self._stream.send(message) and self._unread is None:
            self._unread = 0
        if self._unread is not None:
            self._unread += len(message)
            if self._unread > MAX_UNREAD:
                unread = KvmeshError(ErrorCode.ERROR_CODE_OVERLOADED, "the answers are not read; read them")
                self._stream.fail(unread)
                return
        self._end_when_answered()

    def _end_when_answered(self) -> None:
        if self._half_closed and not self._waiting and not self._message.answers:
            self._stream.end()

    def _tell_later(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        self._untold.append((loop.time() + HELD_S, number))
        if self._telling is None:
            self._telling = loop.call_later(HELD_S, self._tell)

    def _tell(self) -> None:
        self._telling = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._untold and (self._untold[0][0] <= now or self._untold[0][1] not in self._waiting):
            number = self._untold.popleft()[1]
            if number in self._waiting:
                self._answer(number, Held())
        if self._untold:
            self._telling = loop.call_at(self._untold[0][0], self._tell)
