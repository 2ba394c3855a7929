"""Credit here against ledgers shared with other frontends: never more in all, and nothing lost for long."""

from __future__ import annotations

import asyncio

import pytest

from fixtures.tenants import Clock, MemoryExchange, SharedLedgers, new_key
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.tenants.account import IDLE_S, Account
from kvmesh.frontend.tenants.contract import Key
from kvmesh.frontend.tenants.ledger import Ledger
from kvmesh.v1.errors_pb2 import ErrorCode


class Front:
    """One frontend's account of a key."""

    def __init__(self, shared: SharedLedgers, key: Key, clock: Clock, name: str) -> None:
        self.exchange = MemoryExchange(shared, name)
        self.account = self.exchange.account = Account(key, self.exchange, clock)

    async def admits(self, **need: float) -> bool:
        try:
            await self.account.take(need)  # pyright: ignore[reportArgumentType]
        except KvmeshError as error:
            self.error = error
            return False
        return True


class Fronts:
    def __init__(self, count: int = 2, **limits: int) -> None:
        self.clock = Clock()
        self.shared = SharedLedgers()
        self.key, _ = new_key(**limits)
        self.all = [Front(self.shared, self.key, self.clock, f"front-{i}") for i in range(count)]

    def ledger(self) -> Ledger:
        ledger = Ledger.decode(self.shared.values[self.key.id])
        ledger.advance(self.key.limits, self.clock())
        return ledger


async def test_a_key_without_limits_asks_nobody() -> None:
    fronts = Fronts(1)
    assert await fronts.all[0].admits(requests=1, tokens=10**9, month=10**12, concurrency=1)
    assert fronts.all[0].exchange.asked == 0


@pytest.mark.parametrize("limit", [1, 3, 20, 250])
async def test_racing_frontends_admit_exactly_the_limit(limit: int) -> None:
    fronts = Fronts(3, requests_per_minute=limit)
    answers = await asyncio.gather(
        *(front.admits(requests=1) for _ in range(limit + 5) for front in fronts.all)
    )
    admitted = sum(answers)
    # What one holds unused while another is refused: a slice each, at most.
    assert limit - 2 * (limit // 16) <= admitted <= limit
    late = [await front.admits(requests=1) for front in fronts.all for _ in range(limit)]
    assert admitted + sum(late) <= limit


async def test_the_error_says_when_to_come_back() -> None:
    fronts = Fronts(1, requests_per_minute=6)
    front = fronts.all[0]
    assert [await front.admits(requests=1) for _ in range(7)] == [True] * 6 + [False]
    assert front.error.code == ErrorCode.ERROR_CODE_RATE_LIMITED
    assert front.error.retry_after_ms == 10_000
    fronts.clock.now += 9.9
    assert not await front.admits(requests=1)
    assert front.error.retry_after_ms == pytest.approx(100, abs=1)
    fronts.clock.now += 0.2
    assert await front.admits(requests=1)


async def test_refusals_do_not_ask_the_ledger_each_time() -> None:
    fronts = Fronts(1, requests_per_minute=1)
    front = fronts.all[0]
    await front.admits(requests=1)
    await front.admits(requests=1)
    asked = front.exchange.asked
    assert not any([await front.admits(requests=1) for _ in range(100)])
    assert front.exchange.asked == asked


async def test_a_large_limit_is_asked_for_in_few_slices() -> None:
    fronts = Fronts(1, requests_per_minute=10_000)
    front = fronts.all[0]
    assert all([await front.admits(requests=1) for _ in range(9_000)])
    assert front.exchange.asked < 60


async def test_permits_go_from_one_frontend_to_the_other() -> None:
    fronts = Fronts(2, concurrency=2)
    a, b = fronts.all
    assert await a.admits(concurrency=1)
    assert await a.admits(concurrency=1)
    assert not await b.admits(concurrency=1)
    assert b.error.retry_after_ms == 1_000
    a.account.give({"concurrency": 1})
    fronts.clock.now += 0.3
    # It lies idle at `a`, who gives it back when `b` asks.
    assert await b.admits(concurrency=1)
    assert not await a.admits(concurrency=1)


async def test_a_request_that_ends_makes_room_at_once_where_it_ran() -> None:
    front = Fronts(1, concurrency=1).all[0]
    assert await front.admits(concurrency=1)
    assert not await front.admits(concurrency=1)
    front.account.give({"concurrency": 1})
    assert await front.admits(concurrency=1)


async def test_reserved_tokens_that_were_not_used_come_back() -> None:
    fronts = Fronts(1, tokens_per_minute=1_000, tokens_per_month=5_000)
    front = fronts.all[0]
    assert await front.admits(tokens=1_000, month=1_000)
    assert not await front.admits(tokens=100, month=100)
    front.account.give({"tokens": 400, "month": 400})
    assert await front.admits(tokens=400, month=400)
    await front.account.give_back()
    assert fronts.ledger().used_in_period == 1_000


async def test_tokens_beyond_the_reservation_are_owed() -> None:
    fronts = Fronts(2, tokens_per_minute=1_000)
    a, b = fronts.all
    assert await a.admits(tokens=100)
    a.account.give({"tokens": -1_400})
    await a.account.give_back()
    assert not await b.admits(tokens=1)
    # 501 tokens short, at 1,000 a minute.
    assert b.error.retry_after_ms == pytest.approx(30_060, abs=20)


async def test_idle_credit_goes_back_and_the_holder_is_forgotten() -> None:
    fronts = Fronts(1, requests_per_minute=320, concurrency=4)
    front = fronts.all[0]
    assert await front.admits(requests=1, concurrency=1)
    assert fronts.ledger().left("requests", fronts.key.limits) == 300
    front.account.give({"concurrency": 1})
    await front.account.tend()
    assert fronts.ledger().holders
    fronts.clock.now += IDLE_S
    await front.account.tend()
    assert not fronts.ledger().holders
    assert fronts.ledger().left("requests", fronts.key.limits) == 320
    assert not front.account.listed


async def test_a_long_request_keeps_its_permit() -> None:
    fronts = Fronts(2, concurrency=1)
    a, b = fronts.all
    assert await a.admits(concurrency=1)
    for _ in range(60):
        fronts.clock.now += 1
        await a.account.tend()
        assert not await b.admits(concurrency=1)
    a.account.give({"concurrency": 1})
    fronts.clock.now += IDLE_S
    await a.account.tend()
    assert await b.admits(concurrency=1)


async def test_without_a_bus_each_frontend_goes_on_alone_and_the_month_is_settled_after() -> None:
    fronts = Fronts(2, requests_per_minute=4, tokens_per_month=1_000)
    a, b = fronts.all
    assert await a.admits(requests=1, month=100)
    await a.account.give_back()
    assert await b.admits(requests=1, month=100)
    await b.account.give_back()
    for front in fronts.all:
        front.exchange.away = True
    # The documented slack: each admits by itself what was left when it last looked.
    assert [await a.admits(requests=1, month=100) for _ in range(4)] == [True] * 3 + [False]
    assert [await b.admits(requests=1, month=100) for _ in range(4)] == [True] * 2 + [False] * 2
    for front in fronts.all:
        front.exchange.away = False
    fronts.clock.now += 60
    for front in fronts.all:
        assert await front.admits(requests=1, month=100)
        await front.account.give_back()
    assert fronts.ledger().used_in_period == 900


async def test_a_month_used_up_is_another_error_than_a_rate() -> None:
    front = Fronts(1, tokens_per_month=100).all[0]
    assert await front.admits(month=100)
    assert not await front.admits(month=1)
    assert front.error.code == ErrorCode.ERROR_CODE_QUOTA_EXHAUSTED
    assert not front.error.retryable
    assert front.error.retry_after_ms > 86_400_000


async def test_a_request_larger_than_the_limit_is_told_so() -> None:
    front = Fronts(1, tokens_per_minute=100).all[0]
    assert not await front.admits(tokens=101)
    assert not front.error.retryable
    assert front.error.retry_after_ms == 0
    assert "this request alone takes 101" in front.error.message
    assert await front.admits(tokens=100)


async def test_what_is_left_is_known_without_asking() -> None:
    fronts = Fronts(1, requests_per_minute=60)
    front = fronts.all[0]
    assert front.account.left("requests") == 60
    await front.admits(requests=1)
    assert front.account.left("requests") == 59
    fronts.clock.now += 0.5
    assert front.account.left("requests") == 59.5


async def test_other_limits_of_the_same_key_hold_at_once() -> None:
    fronts = Fronts(1, requests_per_minute=1)
    front = fronts.all[0]
    assert await front.admits(requests=1)
    assert not await front.admits(requests=1)
    front.account.change(fronts.key.model_copy(update={"requests_per_minute": 0}))
    assert await front.admits(requests=1)


async def test_waiting_requests_leave_nothing_behind_when_they_are_cancelled() -> None:
    fronts = Fronts(1, requests_per_minute=5, concurrency=5)
    front = fronts.all[0]
    waiting = [asyncio.create_task(front.admits(requests=1, concurrency=1)) for _ in range(3)]
    await asyncio.sleep(0)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await front.account.give_back()
    assert all([await front.admits(requests=1, concurrency=1) for _ in range(5)])


async def test_the_price_of_a_request_is_small() -> None:
    """Not a limit on speed: that a request with credit suspends nowhere is what keeps it cheap."""
    fronts = Fronts(1, requests_per_minute=100_000, tokens_per_minute=10**9, concurrency=100)
    front = fronts.all[0]
    assert await front.admits(requests=1, concurrency=1)
    front.account.give({"concurrency": 1})
    asked = front.exchange.asked
    for _ in range(1_000):
        coroutine = front.account.take({"requests": 1, "concurrency": 1})
        with pytest.raises(StopIteration):
            coroutine.send(None)
        front.account.give({"concurrency": 1})
    assert front.exchange.asked == asked


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (5, 2), (2, 5)])
async def test_a_limit_that_changes_while_requests_run_loses_no_permit(before: int, after: int) -> None:
    fronts = Fronts(1, concurrency=before)
    (front,) = fronts.all
    for _ in range(2):
        assert await front.admits(concurrency=1)
    front.account.change(fronts.key.model_copy(update={"concurrency": after}))
    for _ in range(2):
        front.account.give({"concurrency": 1})
    for limit in (after, 3):
        front.account.change(fronts.key.model_copy(update={"concurrency": limit}))
        fronts.clock.now += IDLE_S + 60
        await front.account.tend()
        admitted = [await front.admits(concurrency=1) for _ in range(6)]
        assert sum(admitted) == (limit or 6)
        for _ in range(sum(admitted)):
            front.account.give({"concurrency": 1})
