"""Route, Select and Report as unary calls: what is answered, and what a caller that leaves leaves behind."""

from __future__ import annotations

from typing import Any, cast

import pytest

from fixtures.holders import worker_info
from fixtures.routing import Router, request
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.streams import Call
from kvmesh.router.calls import RouteCall, answered
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import LeaseReport, ReportRequest, ReportResponse, RouteResponse


class Asked:
    """A call of Route to a router, and what became of it."""

    def __init__(self, router: Router, message: bytes) -> None:
        self.response: RouteResponse | None = None
        self.failed: KvmeshError | None = None
        self.handler = RouteCall(cast(Call, self), router.routing)
        self.handler.on_message(message)

    def answer(self, message: bytes) -> None:
        assert self.response is None
        self.response = RouteResponse.FromString(message)

    def fail(self, error: KvmeshError) -> None:
        self.failed = error
        self.handler.on_closed(error)

    def leave(self) -> None:
        self.handler.on_closed(KvmeshError(ErrorCode.ERROR_CODE_CANCELLED, "left"))


@pytest.fixture
async def router() -> Router:
    router = Router()
    router.put(worker_info("a"))
    return router


async def ask(router: Router, **fields: Any) -> Asked:
    asked = Asked(router, request(**fields).SerializeToString())
    await router.turns()
    return asked


async def test_a_request_is_placed_and_leased(router: Router) -> None:
    asked = await ask(router)
    assert asked.response is not None
    assert asked.response.placement.decode.id == "a"
    asked.handler.on_closed(None)
    assert router.report(asked.response.lease.id, ended=True)


async def test_a_caller_that_leaves_while_it_waits_leaves_no_place_and_no_lease(router: Router) -> None:
    first = await ask(router, tokens=8000)
    second = await ask(router, tokens=8000)
    assert (second.response, router.service.state().held) == (None, 1)
    second.leave()
    assert router.service.state().held == 0
    assert first.response is not None
    assert router.report(first.response.lease.id, ended=True)
    await router.turns()
    assert (second.response, router.service.state().leases) == (None, 0)


async def test_an_answer_that_nobody_heard_is_taken_back(router: Router) -> None:
    asked = await ask(router)
    assert router.service.state().leases == 1
    asked.leave()
    assert router.service.state().leases == 0


async def test_a_refusal_is_the_callers(router: Router) -> None:
    with pytest.raises(KvmeshError) as caught:
        await ask(router, model="other")
    assert caught.value.code == ErrorCode.ERROR_CODE_MODEL_NOT_FOUND
    await ask(router, tokens=8000)
    waiting = await ask(router, tokens=8000)
    router.routing.close()
    assert waiting.failed is not None
    assert waiting.failed.code == ErrorCode.ERROR_CODE_UNAVAILABLE
    assert router.service.state().held == 0


async def test_what_is_no_message_is_refused(router: Router) -> None:
    with pytest.raises(KvmeshError, match="not a RouteRequest"):
        Asked(router, b"\xff")


async def test_reports_are_answered_at_once(router: Router) -> None:
    said: list[bytes] = []

    class Told:
        def answer(self, message: bytes) -> None:
            said.append(message)

    handler = answered(ReportRequest, router.service.report)(cast(Call, Told()))
    handler.on_message(ReportRequest(reports=[LeaseReport(lease_id=7, ended=True)]).SerializeToString())
    assert list(ReportResponse.FromString(said[0]).unknown_lease_ids) == [7]
    with pytest.raises(KvmeshError, match="not a ReportRequest"):
        handler.on_message(b"\xff")
