"""One long-lived stream to one router, shared by all requests of this process."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvmesh.common import telemetry
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.streams import Stream, StreamHub
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import (
    LeaseReport,
    RouteRequest,
    RouteResponse,
    RouteStreamRequest,
    RouteStreamResponse,
)

_METHOD = "/kvmesh.v1.RouterService/RouteStream"


@dataclass(slots=True)
class _Waiting:
    answer: asyncio.Future[RouteResponse]
    patience: float
    # Gives up: at first when nothing at all is heard.
    timer: asyncio.TimerHandle


class RouterLink:
    """Asks and reports; what is said in one turn of the loop is one message.

    The stream opens when first needed, and again after it broke.
    """

    def __init__(self, hub: StreamHub, address: str) -> None:
        self.address = address
        # Times of `time.monotonic`: when the stream broke last; until when the router is left alone.
        self.lost_at = -math.inf
        self.silent_until = 0.0
        self._lost: Callable[[RouterLink], object] | None = None
        self._hub = hub
        self._stream: Stream | None = None
        self._waiting: dict[int, _Waiting] = {}
        self._next_number = 0
        self._message: RouteStreamRequest | None = None

    @property
    def connected(self) -> bool:
        """Whether its stream is open."""
        return self._stream is not None

    def when_lost(self, callback: Callable[[RouterLink], object]) -> None:
        """Call `callback` each time the stream breaks."""
        self._lost = callback

    async def route(self, request: RouteRequest, timeout: float, patience: float) -> RouteResponse:
        """The router's answer. Raises KvmeshError: its refusal, UNAVAILABLE, or DEADLINE_EXCEEDED.

        A first word comes within `timeout` seconds; a router that says that the request waits for a worker
        may take `patience` from then on. Given up or cancelled, the request is taken back; a lease granted
        meanwhile is ended.
        """
        loop = asyncio.get_running_loop()
        self._next_number += 1
        number, answer = self._next_number, loop.create_future()
        timer = loop.call_later(timeout, self._expire, number, timeout)
        self._waiting[number] = waiting = _Waiting(answer, patience, timer)
        self._next_message().routes.add(
            number=number, route=request, traceparent=telemetry.current_traceparent()
        )
        try:
            return await answer
        except (KvmeshError, asyncio.CancelledError):
            self._give_up(number, answer)
            raise
        finally:
            waiting.timer.cancel()
            self._waiting.pop(number, None)

    def report(self, reports: Iterable[LeaseReport]) -> None:
        """Send reports; without this router they are lost, and what they would have freed expires there."""
        self._next_message().reports.extend(reports)

    def end(self) -> None:
        """Send what is due and no more."""
        if self._message is not None:
            self._send()
        if self._stream is not None:
            self._stream.end()

    def on_message(self, message: bytes) -> None:
        for answer in RouteStreamResponse.FromString(message).answers:
            said = answer.WhichOneof("result")
            waiting = self._waiting.get(answer.number)
            if said == "held":
                if waiting is not None:
                    self._be_patient(answer.number, waiting)
            elif waiting is None or waiting.answer.done():
                if said == "response":
                    self._give_back(answer.response)
            elif said == "error":
                # Answered: there is nothing to take back.
                del self._waiting[answer.number]
                waiting.answer.set_exception(KvmeshError.from_proto(answer.error))
            else:
                waiting.answer.set_result(answer.response)

    def on_half_close(self) -> None:
        """Of served streams only."""

    def on_writable(self) -> None:
        """Every message is waited for: a router that is behind holds its callers, not its inbox."""

    def on_closed(self, error: KvmeshError | None) -> None:
        self._stream = None
        self.lost_at = time.monotonic()
        why = error.message if error is not None else "it closed the stream"
        lost = f"router at {self.address}: {why}"
        for waiting in self._waiting.values():
            if not waiting.answer.done():
                waiting.answer.set_exception(KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, lost))
        if self._lost is not None:
            self._lost(self)

    def _be_patient(self, number: int, waiting: _Waiting) -> None:
        waiting.timer.cancel()
        waiting.timer = asyncio.get_running_loop().call_later(
            waiting.patience, self._expire, number, waiting.patience
        )

    def _give_up(self, number: int, answer: asyncio.Future[RouteResponse]) -> None:
        """Whoever asked has gone: a placement that is there goes back, and none is wanted any more."""
        if answer.done() and not answer.cancelled() and answer.exception() is None:
            self._give_back(answer.result())
            return
        unsent = self._message.routes if self._message is not None else []
        for place, asked in enumerate(unsent):
            if asked.number == number:
                del unsent[place]
                return
        if number in self._waiting and self._stream is not None:
            self._next_message().cancels.append(number)

    def _give_back(self, response: RouteResponse) -> None:
        if response.HasField("lease"):
            self.report([LeaseReport(lease_id=response.lease.id, ended=True)])

    def _next_message(self) -> RouteStreamRequest:
        if self._message is None:
            self._message = RouteStreamRequest()
            asyncio.get_running_loop().call_soon(self._send)
        return self._message

    def _send(self) -> None:
        message, self._message = self._message, None
        if message is None:
            return
        if self._stream is None:
            self._stream = self._hub.open(self.address, _METHOD, self)
        self._stream.send(message.SerializeToString())

    def _expire(self, number: int, timeout: float) -> None:
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.answer.done():
            late = f"router at {self.address}: no answer within {timeout:.3g} s"
            waiting.answer.set_exception(KvmeshError(ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED, late))
