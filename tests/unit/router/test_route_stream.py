"""RouteStream: every request of a stream gets its own answer, as decisions are made."""

from __future__ import annotations

from typing import Any, cast

import pytest

from fixtures.holders import worker_info
from fixtures.routing import Router, request
from fixtures.waiting import eventually
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.streams import Stream
from kvmesh.router import route_stream
from kvmesh.router.route_stream import RouteStream
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import (
    LeaseReport,
    NumberedRoute,
    RouteAnswer,
    RouteRequest,
    RouteStreamRequest,
    RouteStreamResponse,
)


class Caller:
    """The other end of a stream to a router with one worker."""

    def __init__(self, **config: Any) -> None:
        self.router = Router(**config)
        self.router.put(worker_info("a"))
        self.keeps_up = True
        self.ended = False
        self.failed: KvmeshError | None = None
        self.messages = 0
        self.answers: dict[int, RouteAnswer] = {}
        self.handler = RouteStream(cast(Stream, self), self.router.routing)

    # The stream.

    def send(self, message: bytes) -> bool:
        self.messages += 1
        for answer in RouteStreamResponse.FromString(message).answers:
            self.answers[answer.number] = answer
        return self.keeps_up

    def end(self) -> None:
        self.ended = True

    def fail(self, error: KvmeshError) -> None:
        self.failed = error

    # The caller.

    async def ask(
        self,
        routes: dict[int, RouteRequest] | None = None,
        reports: list[LeaseReport] | None = None,
        cancels: list[int] | None = None,
    ) -> None:
        numbered = [NumberedRoute(number=number, route=route) for number, route in (routes or {}).items()]
        message = RouteStreamRequest(routes=numbered, reports=reports or [], cancels=cancels or [])
        self.handler.on_message(message.SerializeToString())
        await self.router.turns()

    def lease(self, number: int) -> int:
        return self.answers[number].response.lease.id

    @property
    def held(self) -> int:
        return self.router.service.state().held

    @property
    def leases(self) -> int:
        return self.router.service.state().leases


async def test_each_request_has_its_answer_and_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller()
    submit = caller.router.routing.submit

    def broken(route: RouteRequest, answer: Any) -> int:
        if route.request_id == "bug":
            raise ZeroDivisionError
        return submit(route, answer)

    monkeypatch.setattr(caller.router.routing, "submit", broken)
    at_random = request(policy="random")
    await caller.ask({7: at_random, 8: request(policy="no"), 9: request(request_id="bug"), 10: at_random})
    assert set(caller.answers) == {7, 8, 9, 10}
    assert caller.messages == 1, "answers of one turn are one message"
    assert caller.lease(7) != caller.lease(10)
    refused, error = caller.answers[8].error, caller.answers[9].error
    assert (refused.code, refused.param) == (ErrorCode.ERROR_CODE_INVALID_ARGUMENT, "policy")
    assert error.code == ErrorCode.ERROR_CODE_INTERNAL
    assert "ZeroDivision" not in error.message


async def test_reports_come_before_the_routes_and_alone_need_no_answer() -> None:
    caller = Caller()
    await caller.ask({1: request(tokens=8000)})
    await caller.ask({2: request(tokens=8000)}, [LeaseReport(lease_id=caller.lease(1), ended=True)])
    assert caller.answers[2].HasField("response"), "the worker was free by then"
    messages = caller.messages
    await caller.ask(reports=[LeaseReport(lease_id=caller.lease(2), prefill_done=True)])
    assert caller.messages == messages
    assert caller.router.slots("a") == (1, 0, 500)


async def test_answers_come_in_the_order_of_decisions() -> None:
    caller = Caller()
    await caller.ask({1: request(tokens=8000)})
    await caller.ask({2: request(tokens=8000), 3: request(policy="random")})
    assert set(caller.answers) == {1, 3}
    await caller.ask(
        reports=[LeaseReport(lease_id=caller.lease(n), prefill_done=True) for n in (1, 3)],
    )
    assert set(caller.answers) == {1, 2, 3}


async def test_a_caller_is_told_that_its_request_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_stream, "HELD_S", 0.01)
    caller = Caller()
    await caller.ask({1: request(tokens=8000)})
    await caller.ask({2: request(tokens=8000)})
    await eventually(lambda: 2 in caller.answers)
    assert caller.answers[2].HasField("held")
    await caller.ask(reports=[LeaseReport(lease_id=caller.lease(1), ended=True)])
    assert caller.answers[2].HasField("response")


async def test_a_cancelled_route_is_taken_back() -> None:
    caller = Caller()
    await caller.ask({1: request(tokens=8000)})
    await caller.ask({2: request(tokens=8000), 3: request(tokens=8000)})
    assert caller.held == 2
    # An unknown number, and one that was answered, change nothing.
    await caller.ask(cancels=[2, 1, 99])
    assert (caller.held, caller.leases) == (1, 1)
    await caller.ask(reports=[LeaseReport(lease_id=caller.lease(1), ended=True)])
    assert set(caller.answers) == {1, 3}


async def test_a_closed_stream_takes_its_requests_back() -> None:
    caller = Caller()
    await caller.ask({1: request(tokens=8000)})
    await caller.ask({2: request(tokens=8000)})
    caller.handler.on_closed(None)
    assert caller.held == 0
    assert caller.leases == 1, "the one that was placed goes on for a while"


async def test_what_was_placed_and_not_sent_when_the_stream_closed_is_ended() -> None:
    caller = Caller()
    message = RouteStreamRequest(routes=[NumberedRoute(number=1, route=request(policy="random"))])
    caller.handler.on_message(message.SerializeToString())
    assert caller.leases == 1
    caller.handler.on_closed(None)
    await caller.router.turns()
    assert (caller.leases, caller.messages) == (0, 0)


async def test_what_is_no_request_is_refused() -> None:
    with pytest.raises(KvmeshError) as caught:
        Caller().handler.on_message(b"\xff\xff")
    assert caught.value.code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT


async def test_answers_nobody_reads_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_stream, "MAX_UNREAD", 200)
    caller = Caller()
    caller.keeps_up = False
    await caller.ask({1: request(policy="random")})
    caller.handler.on_writable()
    assert caller.failed is None
    await caller.ask({number: request(policy="random") for number in range(2, 12)})
    assert caller.failed is not None
    assert caller.failed.code == ErrorCode.ERROR_CODE_OVERLOADED


async def test_a_half_closed_stream_ends_once_all_is_answered() -> None:
    caller = Caller()
    await caller.ask({1: request(tokens=8000)})
    await caller.ask({2: request(tokens=8000)})
    caller.handler.on_half_close()
    assert not caller.ended
    caller.router.report(caller.lease(1), ended=True)
    await caller.router.turns()
    assert 2 in caller.answers
    assert caller.ended


async def test_an_idle_half_closed_stream_ends_at_once() -> None:
    caller = Caller()
    caller.handler.on_half_close()
    assert caller.ended
