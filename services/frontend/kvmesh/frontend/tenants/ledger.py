"""What is left of a key's limits, as all frontends share it: the value under its id in the bucket.

Pure: a ledger knows no clock and no bus. Frontends take credit out in slices and give back what they do not
need, each change by compare-and-set; so together they never have more than there is.

`requests` and `tokens` are token buckets (a minute's worth at most, refilled evenly); `month` counts what is
taken in a calendar month; `concurrency` is what holders have of the permits. A holder that has not been seen
for `HOLDER_S` has died: its permits are free again, and the credit it held is lost, never granted twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

import orjson

from kvmesh.frontend.tenants.contract import Limits

Dimension = Literal["requests", "tokens", "concurrency", "month"]
Amounts = dict[Dimension, float]
DIMENSIONS: tuple[Dimension, ...] = ("requests", "tokens", "concurrency", "month")

HOLDER_S = 15.0
# A slice is this part of the limit at most, and of what is left: the less there is, the less lies idle.
_OF_LIMIT = 16
_OF_LEFT = 4
# Concurrency has nothing to say on when a permit comes back.
_PERMIT_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why nothing was granted."""

    dimension: Dimension
    # Seconds until there may be enough; infinite where there never is.
    wait_s: float
    # Whether another frontend has credit that it may not need.
    held_elsewhere: bool


class Ledger:
    """Belongs to whoever decoded it, until it is encoded again."""

    def __init__(self, limits: Limits, now: float) -> None:
        """A key's first ledger: everything is there. `now` is Unix time."""
        self.at = now
        self.levels: dict[str, float] = {
            "requests": float(limits.requests),
            "tokens": float(limits.tokens),
        }
        self.period = period_of(now)
        self.used_in_period = 0.0
        # Holder -> permits, Unix time at which it was last seen.
        self.holders: dict[str, tuple[int, float]] = {}

    def encode(self) -> bytes:
        return orjson.dumps([self.at, self.levels, self.period, self.used_in_period, self.holders])

    @classmethod
    def decode(cls, raw: bytes) -> Ledger:
        """Raises ValueError for what no ledger was encoded to."""
        try:
            at, levels, period, used, holders = orjson.loads(raw)
            ledger = cls(Limits(0, 0, 0, 0), float(at))
            ledger.levels = {"requests": float(levels["requests"]), "tokens": float(levels["tokens"])}
            ledger.period, ledger.used_in_period = str(period), float(used)
            ledger.holders = {name: (int(permits), float(seen)) for name, (permits, seen) in holders.items()}
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a ledger: {error}") from None
        return ledger

    def advance(self, limits: Limits, now: float) -> None:
        """Refill up to `now`; a clock behind the last one changes nothing."""
        elapsed = max(0.0, now - self.at)
        self.at += elapsed
        for dimension in ("requests", "tokens"):
            limit = getattr(limits, dimension)
            self.levels[dimension] = min(float(limit), self.levels[dimension] + limit * elapsed / 60)
        if (period := period_of(now)) > self.period:
            self.period, self.used_in_period = period, 0.0
        self.holders = {
            name: (permits, seen) for name, (permits, seen) in self.holders.items() if now - seen < HOLDER_S
        }

    def left(self, dimension: Dimension, limits: Limits) -> float:
        """What can be taken now; negative where more was used than there was."""
        if dimension == "month":
            return limits.month - self.used_in_period
        if dimension == "concurrency":
            return limits.concurrency - sum(permits for permits, _ in self.holders.values())
        return self.levels[dimension]

    def take(
        self, holder: str, limits: Limits, need: Amounts, wish: Amounts, now: float
    ) -> Amounts | Shortage:
        """Give the holder all it needs, and more where it wishes for more and there is some; or nothing.

        Dimensions without a limit are skipped.
        """
        self.advance(limits, now)
        granted: Amounts = {}
        for dimension, amount in need.items():
            limit = getattr(limits, dimension)
            if not limit:
                continue
            left = self.left(dimension, limits)
            if left < amount:
                elsewhere = any(name != holder for name in self.holders)
                return Shortage(dimension, self.wait_s(dimension, limits, amount, now), elsewhere)
            # No permit lies idle: whoever needs one would wait for it.
            spare = 0.0 if dimension == "concurrency" else slice_of(limit, left)
            granted[dimension] = max(amount, min(left, max(spare, wish.get(dimension, 0.0))))
        for dimension, amount in granted.items():
            self._add(dimension, -amount, limits)
        self._hold(holder, int(granted.get("concurrency", 0)), now)
        return granted

    def give_back(self, holder: str, limits: Limits, amounts: Amounts, now: float, *, keep: bool) -> None:
        """Put credit back, or take what is owed where it is negative; `keep`: the holder still has some."""
        self.advance(limits, now)
        for dimension, amount in amounts.items():
            self._add(dimension, amount, limits)
        self._hold(holder, -int(amounts.get("concurrency", 0)), now)
        if not keep:
            self.holders.pop(holder, None)

    def renew(self, holder: str, permits: int, limits: Limits, now: float) -> None:
        """The holder lives, and has so many permits."""
        self.advance(limits, now)
        self.holders[holder] = (permits, now)

    def wait_s(self, dimension: Dimension, limits: Limits, amount: float, now: float) -> float:
        """Seconds until `amount` will be there, if nobody takes any of it."""
        limit = getattr(limits, dimension)
        if amount > limit:
            return float("inf")
        if dimension == "concurrency":
            return _PERMIT_WAIT_S
        if dimension == "month":
            return next_period(now) - now
        return max(0.0, amount - self.left(dimension, limits)) * 60 / limit

    def _add(self, dimension: Dimension, amount: float, limits: Limits) -> None:
        if dimension == "month":
            self.used_in_period = max(0.0, self.used_in_period - amount)
        elif dimension != "concurrency":
            level = self.levels[dimension] + amount
            self.levels[dimension] = min(float(getattr(limits, dimension)), level)

    def _hold(self, holder: str, permits: int, now: float) -> None:
        held = self.holders.get(holder, (0, 0.0))[0]
        self.holders[holder] = (max(0, held + permits), now)


def slice_of(limit: int, left: float) -> float:
    """What a frontend takes at once, so that it need not ask for every request."""
    return max(0.0, min(limit // _OF_LIMIT, left // _OF_LEFT))


def period_of(now: float) -> str:
    """The calendar month, UTC, as text that sorts."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m")


def next_period(now: float) -> float:
    """Unix time at which the next month begins."""
    first = datetime.fromtimestamp(now, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + timedelta(days=32)).replace(day=1).timestamp()


def whole(amounts: Mapping[Dimension, float]) -> Amounts:
    """Without the zeros."""
    return {dimension: amount for dimension, amount in amounts.items() if amount}
