"""Several routers before one frontend: requests are spread, and one that dies fails none."""

from __future__ import annotations

import asyncio
import weakref

import pytest

from fixtures.frontend import EXPLAIN, Frontend, ScriptedRouter, endless, frontend, make
from fixtures.scripted_worker import ROLE_AGGREGATED, ScriptedWorker
from fixtures.waiting import eventually
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.streams import StreamHub
from kvmesh.frontend.mesh.router_link import RouterLink
from kvmesh.v1.errors_pb2 import ErrorCode


async def join(front: Frontend, answer_ids: list[int]) -> ScriptedWorker:
    worker = make(ROLE_AGGREGATED, answer_ids)
    await front.join(worker)
    return worker


async def ask(front: Frontend) -> str:
    """The policy that placed the request."""
    response = await front.chat(**EXPLAIN)
    assert response.status_code == 200, response.text
    return response.json()["kvmesh"]["policy"]


def waiting(*routers: ScriptedRouter) -> None:
    for router in routers:
        router.gate.clear()


async def test_requests_are_spread(answer_ids: list[int]) -> None:
    async with frontend(routers=3) as front:
        worker = await join(front, answer_ids)
        for _ in range(9):
            assert await ask(front) == "scripted"
        assert [len(router.requests) for router in front.routers] == [3, 3, 3]
        # Each hears of its own leases only.
        await eventually(lambda: front.idle(worker))
        for number, router in enumerate(front.routers):
            assert {report.lease_id // 1_000_000 for report in router.reports} == {number}
        await worker.kill()


async def test_what_waits_at_a_router_that_dies_is_placed_by_another(answer_ids: list[int]) -> None:
    async with frontend(routers=2) as front:
        worker = await join(front, answer_ids)
        dying, other = front.routers
        dying.holds = True
        waiting(dying)
        asking = [asyncio.create_task(ask(front)) for _ in range(8)]
        await eventually(lambda: len(dying.requests) == 4)
        await dying.stop()
        assert await asyncio.gather(*asking) == ["scripted"] * 8
        assert len(other.requests) == 8
        # While it is away nobody is asked in vain for long, and it is found again.
        assert [await ask(front) for _ in range(6)] == ["scripted"] * 6
        dying.gate.set()
        await dying.start()
        before = len(dying.requests)
        async with asyncio.timeout(20):
            while len(dying.requests) == before:
                assert await ask(front) == "scripted"
        await eventually(lambda: not other.live)
        await worker.kill()


async def test_leases_of_a_router_that_dies_are_reported_to_another(answer_ids: list[int]) -> None:
    async with frontend(routers=2) as front:
        worker = await join(front, answer_ids)
        worker.script = endless
        worker.step_s = 0.05
        asking = [asyncio.create_task(front.chat(max_tokens=40)) for _ in range(4)]
        await eventually(lambda: len(worker.live) == 4)
        dying, other = front.routers
        orphans = set(dying.live)
        assert len(orphans) == 2
        await dying.stop()
        await eventually(lambda: orphans <= {report.lease_id for report in other.reports})
        assert [one.status_code for one in await asyncio.gather(*asking)] == [200] * 4
        await eventually(lambda: orphans <= {r.lease_id for r in other.reports if r.ended})
        last = {report.lease_id: report for report in other.reports}
        assert all(last[lease].output_tokens == 40 for lease in orphans), "all that was reached is said again"
        await worker.kill()


@pytest.mark.parametrize(
    "code",
    [
        ErrorCode.ERROR_CODE_NO_WORKER_READY,
        ErrorCode.ERROR_CODE_MODEL_NOT_FOUND,
        ErrorCode.ERROR_CODE_UNAVAILABLE,
    ],
)
async def test_a_router_that_knows_less_is_not_the_last_word(code: ErrorCode, answer_ids: list[int]) -> None:
    async with frontend(routers=2) as front:
        worker = await join(front, answer_ids)
        front.routers[0].refusal = KvmeshError(code, "it has just started")
        assert [await ask(front) for _ in range(4)] == ["scripted"] * 4
        front.routers[1].refusal = front.routers[0].refusal
        assert await ask(front) == "fallback"
        await worker.kill()


async def test_a_refusal_stands(answer_ids: list[int]) -> None:
    async with frontend(routers=2) as front:
        worker = await join(front, answer_ids)
        refusal = KvmeshError(ErrorCode.ERROR_CODE_RATE_LIMITED, "too many wait", retry_after_ms=1_000)
        for router in front.routers:
            router.refusal = refusal
        assert (await front.chat()).status_code == 429
        assert sum(len(router.requests) for router in front.routers) == 1
        await worker.kill()


async def test_a_router_that_says_nothing_is_left_alone(
    answer_ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmesh.frontend.mesh.routers.FIRST_WORD_S", 0.2)
    monkeypatch.setattr("kvmesh.frontend.mesh.routers.PAUSE_S", 600.0)
    async with frontend(routers=2) as front:
        worker = await join(front, answer_ids)
        mute, other = front.routers
        waiting(mute)
        assert [await ask(front) for _ in range(6)] == ["scripted"] * 6
        assert (len(mute.requests), len(other.requests)) == (1, 6)
        await eventually(lambda: len(mute.cancels) == 1)
        await worker.kill()


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[RouterLink]:
    """All that are made and not forgotten."""
    made: weakref.WeakSet[RouterLink] = weakref.WeakSet()
    original = RouterLink.__init__

    def init(self: RouterLink, hub: StreamHub, address: str) -> None:
        original(self, hub, address)
        made.add(self)

    monkeypatch.setattr(RouterLink, "__init__", init)
    return made


async def test_routers_that_come_later_are_asked_and_those_that_leave_are_not(
    answer_ids: list[int], links: weakref.WeakSet[RouterLink]
) -> None:
    async with frontend(routers=3) as front:
        worker = await join(front, answer_ids)
        first, second, third = front.routers
        addresses = front.directory.addresses
        front.directory.set(addresses[0])
        for _ in range(4):
            assert await ask(front) == "scripted"
        assert [len(router.requests) for router in front.routers] == [4, 0, 0]
        front.directory.set(*addresses)
        for _ in range(6):
            assert await ask(front) == "scripted"
        assert [len(router.requests) for router in front.routers] == [6, 2, 2]
        front.directory.set(*addresses[1:])
        for _ in range(4):
            assert await ask(front) == "scripted"
        assert [len(router.requests) for router in front.routers] == [6, 4, 4]
        front.directory.set()
        assert await ask(front) == "fallback"
        front.directory.set(addresses[2])
        assert await ask(front) == "scripted"
        assert len(third.requests) == 5
        await eventually(lambda: front.idle(worker))
        assert not first.live
        # Of those that have left nothing is kept once their streams have ended.
        assert len(links) == 3
        await first.stop()
        await second.stop()
        await eventually(lambda: len(links) == 1)
        await worker.kill()


async def test_a_router_that_leaves_answers_what_it_was_asked(answer_ids: list[int]) -> None:
    async with frontend(routers=2) as front:
        worker = await join(front, answer_ids)
        first, second = front.routers
        addresses = front.directory.addresses
        front.directory.set(addresses[0])
        waiting(first)
        asked = asyncio.create_task(ask(front))
        await eventually(lambda: len(first.requests) == 1)
        front.directory.set(addresses[1])
        assert await ask(front) == "scripted"
        assert len(second.requests) == 1
        first.gate.set()
        assert await asked == "scripted"
        # Its lease, which the other has taken over by then, ends there.
        await eventually(
            lambda: any(report.ended for report in second.reports if report.lease_id in first.live)
        )
        first.live.clear()
        await eventually(lambda: front.idle(worker))
        await worker.kill()
