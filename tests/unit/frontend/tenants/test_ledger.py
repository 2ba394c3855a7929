"""What is left of a key's limits: refill, slices, permits and months, with the clock in the test's hand."""

from __future__ import annotations

import pytest

from fixtures.tenants import NOON
from kvmesh.frontend.tenants.contract import Limits
from kvmesh.frontend.tenants.ledger import HOLDER_S, Amounts, Ledger, Shortage, next_period, period_of

LIMITS = Limits(requests=60, tokens=6_000, concurrency=4, month=100_000)


def take(ledger: Ledger, now: float, holder: str = "a", wish: Amounts | None = None, **need: float) -> object:
    return ledger.take(holder, LIMITS, need, wish or {}, now)  # pyright: ignore[reportArgumentType]


def test_a_fresh_ledger_has_everything() -> None:
    ledger = Ledger(LIMITS, NOON)
    assert ledger.left("requests", LIMITS) == 60
    assert ledger.left("tokens", LIMITS) == 6_000
    assert ledger.left("concurrency", LIMITS) == 4
    assert ledger.left("month", LIMITS) == 100_000


def test_credit_comes_in_slices_that_shrink_with_what_is_left() -> None:
    ledger = Ledger(LIMITS, NOON)
    assert take(ledger, NOON, requests=1) == {"requests": 3}
    assert take(ledger, NOON, requests=50) == {"requests": 50}
    assert take(ledger, NOON, requests=1) == {"requests": 1}
    assert ledger.left("requests", LIMITS) == 6


def test_what_others_wait_for_is_granted_as_far_as_there_is_some() -> None:
    ledger = Ledger(LIMITS, NOON)
    assert take(ledger, NOON, requests=1, wish={"requests": 100}) == {"requests": 60}


def test_a_minutes_worth_comes_back_evenly() -> None:
    ledger = Ledger(LIMITS, NOON)
    take(ledger, NOON, requests=60)
    short = take(ledger, NOON, requests=1)
    assert short == Shortage("requests", 1.0, held_elsewhere=False)
    assert isinstance(take(ledger, NOON + 0.9, requests=1), Shortage)
    assert take(ledger, NOON + 1.0, requests=1) == {"requests": 1}
    ledger.advance(LIMITS, NOON + 3_600)
    assert ledger.left("requests", LIMITS) == 60


def test_nothing_is_taken_where_one_dimension_is_short() -> None:
    ledger = Ledger(LIMITS, NOON)
    take(ledger, NOON, requests=60)
    assert isinstance(take(ledger, NOON, tokens=10, requests=1), Shortage)
    assert ledger.left("tokens", LIMITS) == 6_000


def test_more_than_the_limit_never_fits() -> None:
    short = take(Ledger(LIMITS, NOON), NOON, tokens=6_001)
    assert short == Shortage("tokens", float("inf"), held_elsewhere=False)


def test_permits_are_granted_without_spare_and_come_back() -> None:
    ledger = Ledger(LIMITS, NOON)
    assert take(ledger, NOON, concurrency=1) == {"concurrency": 1}
    assert take(ledger, NOON, "b", concurrency=3) == {"concurrency": 3}
    assert take(ledger, NOON, "c", concurrency=1) == Shortage("concurrency", 1.0, held_elsewhere=True)
    ledger.give_back("b", LIMITS, {"concurrency": 3}, NOON, keep=False)
    assert take(ledger, NOON, "c", concurrency=1) == {"concurrency": 1}


def test_a_dead_holders_permits_are_free_again_and_a_living_ones_are_not() -> None:
    ledger = Ledger(LIMITS, NOON)
    take(ledger, NOON, "dead", concurrency=2)
    take(ledger, NOON, "alive", concurrency=2)
    ledger.renew("alive", 2, LIMITS, NOON + 10)
    assert take(ledger, NOON + HOLDER_S - 1, "c", concurrency=1) != {"concurrency": 1}
    assert take(ledger, NOON + HOLDER_S, "c", concurrency=2) == {"concurrency": 2}
    assert isinstance(take(ledger, NOON + HOLDER_S, "c", concurrency=1), Shortage)


def test_a_month_is_used_up_until_the_next_begins() -> None:
    ledger = Ledger(LIMITS, NOON)
    assert take(ledger, NOON, month=100_000) == {"month": 100_000}
    short = take(ledger, NOON, month=1)
    assert isinstance(short, Shortage)
    assert NOON + short.wait_s == next_period(NOON)
    assert take(ledger, next_period(NOON), month=100_000) == {"month": 100_000}


@pytest.mark.parametrize(
    ("now", "period", "following"),
    [(NOON, "2026-06", 1_782_864_000.0), (1_798_761_599.0, "2026-12", 1_798_761_600.0)],
)
def test_periods_are_calendar_months(now: float, period: str, following: float) -> None:
    assert period_of(now) == period
    assert next_period(now) == following


def test_debt_is_worked_off() -> None:
    ledger = Ledger(LIMITS, NOON)
    take(ledger, NOON, tokens=6_000)
    ledger.give_back("a", LIMITS, {"tokens": -3_000, "month": -50}, NOON, keep=False)
    short = take(ledger, NOON, tokens=100)
    assert isinstance(short, Shortage)
    assert short.wait_s == 31
    assert ledger.used_in_period == 50


def test_a_clock_that_goes_back_refills_nothing() -> None:
    ledger = Ledger(LIMITS, NOON)
    take(ledger, NOON, requests=60)
    assert isinstance(take(ledger, NOON - 50, requests=1), Shortage)
    assert isinstance(take(ledger, NOON, requests=1), Shortage)


def test_it_survives_its_encoding() -> None:
    ledger = Ledger(LIMITS, NOON)
    take(ledger, NOON, requests=1, tokens=100, concurrency=2, month=100)
    again = Ledger.decode(ledger.encode())
    assert again.encode() == ledger.encode()
    assert again.left("concurrency", LIMITS) == 2


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"[1,2,3,4,5]", b'[1,{},"",0,{}]', b"\xff"])
def test_what_is_no_ledger_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - orjson has its own subclass
        Ledger.decode(raw)
