"""What one key may use through this frontend: credit, fetched in slices from the ledger that all share.

A request is charged against credit at hand without waiting; only when that is used up is the ledger asked.
While the bus is away the frontend goes on with a ledger of its own, begun where the shared one was last seen.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Callable

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.tenants.contract import Key
from kvmesh.frontend.tenants.exchange import Exchange
from kvmesh.frontend.tenants.ledger import DIMENSIONS, Amounts, Dimension, Ledger, Shortage, whole
from kvmesh.v1.errors_pb2 import ErrorCode

# A refusal stands this long at most before the ledger is asked again.
_REFUSE_S = 0.25
# Credit unused for so long goes back.
IDLE_S = 2.0
# Holders say that they live this often.
_RENEW_S = 5.0

_WORDS: dict[Dimension, str] = {
    "requests": "requests a minute",
    "tokens": "tokens a minute",
    "concurrency": "requests at once",
    "month": "tokens a month",
}


class Account:
    """Belongs to one event loop."""

    def __init__(self, key: Key, exchange: Exchange, clock: Callable[[], float]) -> None:
        """`clock` gives Unix time."""
        self.key = key
        self._exchange = exchange
        self._clock = clock
        # At hand. Negative where more was used than had been reserved.
        self._credit: Amounts = dict.fromkeys(DIMENSIONS, 0.0)
        self._waiting: Amounts = dict.fromkeys(DIMENSIONS, 0.0)
        # Requests alive, whether or not there is a limit: one may be set while they run.
        self._live = 0
        self._lock = asyncio.Lock()
        # Dimension -> the amount that was refused, when it may be there, when to ask again.
        self._refused: dict[Dimension, tuple[float, float, float]] = {}
        # The ledger as last seen; of this frontend alone while `_alone`.
        self._ledger = Ledger(key.limits, clock())
        self._alone = False
        self._alone_month = 0.0
        self._taken_at = self._written_at = clock()
        # Whether the ledger knows this frontend as a holder, or has to hear of what is owed.
        self.listed = False

    @property
    def busy(self) -> bool:
        """Whether it is asking the ledger just now."""
        return self._lock.locked()

    @property
    def _in_use(self) -> int:
        """Permits of the ledger's that live requests have."""
        return self._live if self.key.limits.concurrency else 0

    def change(self, key: Key) -> None:
        """The same key, perhaps with other limits; they hold from now on."""
        self.key = key
        self._refused.clear()

    async def take(self, need: Amounts) -> None:
        """Charge all of `need`, or nothing. Raises KvmeshError: RATE_LIMITED or QUOTA_EXHAUSTED.

        Returns without suspending where there is credit enough.
        """
        live = int(need.get("concurrency", 0))
        limits = self.key.limits
        need = {dimension: amount for dimension, amount in need.items() if getattr(limits, dimension)}
        if not self._covers(need):
            await self._fetch(need)
        for dimension, amount in need.items():
            self._credit[dimension] -= amount
        self._live += live
        self._taken_at = self._clock()

    def give(self, amounts: Amounts) -> None:
        """Credit what was charged and not used; negative: charge what was used beyond. Never refused."""
        limits = self.key.limits
        self._live -= int(amounts.get("concurrency", 0))
        for dimension, amount in amounts.items():
            if getattr(limits, dimension):
                self._credit[dimension] += amount
                if amount > 0:
                    self._refused.pop(dimension, None)
                self.listed = True

    def left(self, dimension: Dimension) -> float:
        """What can be used now, as far as this frontend knows; at least 0."""
        ledger = copy.copy(self._ledger)
        ledger.levels = dict(ledger.levels)
        ledger.advance(self.key.limits, self._clock())
        shared = ledger.left(dimension, self.key.limits)
        return min(getattr(self.key.limits, dimension), max(0.0, shared + self._credit[dimension]))

    async def tend(self) -> None:
        """Once a second: give back what lies idle, tell the ledger that this holder lives."""
        if not self.listed:
            return
        now = self._clock()
        if now - self._taken_at >= IDLE_S and (whole(self._credit) or not self._in_use):
            await self.give_back()
        elif now - self._written_at >= _RENEW_S:
            async with self._lock:
                await self._change(self._renew)

    async def give_back(self) -> None:
        """Return all credit at hand to the ledger, and what is owed."""
        async with self._lock:
            if not self.listed:
                return
            amounts, self._credit = whole(self._credit), dict.fromkeys(DIMENSIONS, 0.0)

            def back(ledger: Ledger, at: float) -> None:
                keep = self._in_use > 0
                ledger.give_back(self._exchange.holder, self.key.limits, amounts, at, keep=keep)

            await self._change(back)
            self.listed = self._in_use > 0 or bool(whole(self._credit))

    def _renew(self, ledger: Ledger, at: float) -> None:
        held = int(self._in_use + self._credit["concurrency"])
        ledger.renew(self._exchange.holder, held, self.key.limits, at)

    def _covers(self, need: Amounts) -> bool:
        return all(self._credit[dimension] >= amount for dimension, amount in need.items())

    async def _fetch(self, need: Amounts) -> None:
        for dimension, amount in need.items():
            if amount > getattr(self.key.limits, dimension):
                raise self._error(dimension, amount, math.inf)
        self._check_refused(need)
        for dimension, amount in need.items():
            self._waiting[dimension] += amount
        try:
            async with self._lock:
                recalled = False
                while not self._covers(need):
                    self._check_refused(need)
                    short = await self._ask(need)
                    if short is None:
                        continue
                    if short.held_elsewhere and not recalled and not self._alone:
                        recalled = True
                        await self._exchange.recall(self.key.id)
                        continue
                    self._refuse(short, need)
        finally:
            for dimension, amount in need.items():
                self._waiting[dimension] -= amount

    async def _ask(self, need: Amounts) -> Shortage | None:
        """Take from the ledger what is missing; what others wait for here, too, as far as there is some."""
        limits, holder = self.key.limits, self._exchange.holder
        owed: Amounts = {d: c for d, c in self._credit.items() if c < 0}
        missing: Amounts = {
            d: amount - max(0.0, self._credit[d]) for d, amount in need.items() if self._credit[d] < amount
        }
        result: Amounts | Shortage = {}

        def take(ledger: Ledger, at: float) -> bool:
            nonlocal result
            if owed:
                ledger.give_back(holder, limits, owed, at, keep=True)
            result = ledger.take(holder, limits, missing, self._waiting, at)
            return bool(owed) or not isinstance(result, Shortage)

        await self._change(take)
        for dimension in owed:
            self._credit[dimension] = 0.0
        if isinstance(result, Shortage):
            return result
        for dimension, amount in result.items():
            self._credit[dimension] += amount
        self.listed = True
        return None

    async def _change(self, apply: Callable[[Ledger, float], bool | None]) -> None:
        """Apply to the shared ledger, else to this frontend's own. False from `apply`: nothing to write."""
        now = self._clock()
        returning = self._alone
        own = self._ledger

        def change(ledger: Ledger | None) -> Ledger | None:
            ledger = ledger or Ledger(self.key.limits, now)
            if returning:
                self._settle_outage(ledger, own, now)
            written = apply(ledger, now)
            self._ledger = ledger
            return None if written is False and not returning else ledger

        try:
            await self._exchange.change(self.key.id, change)
        except KvmeshError:
            self._alone = True
            self._ledger = own
            # Nobody else's permits and credit can be asked for now.
            own.holders = {h: held for h, held in own.holders.items() if h == self._exchange.holder}
            period = own.period
            own.advance(self.key.limits, now)
            if own.period != period:
                self._alone_month = 0.0
            before = own.used_in_period
            apply(own, now)
            self._alone_month += own.used_in_period - before
            return
        if returning:
            self._alone, self._alone_month = False, 0.0
        self._written_at = now

    def _settle_outage(self, shared: Ledger, own: Ledger, now: float) -> None:
        """What was used while the bus was away was not written anywhere."""
        shared.advance(self.key.limits, now)
        own.advance(self.key.limits, now)
        shared.used_in_period = max(0.0, shared.used_in_period + self._alone_month)
        for dimension, level in own.levels.items():
            shared.levels[dimension] = min(shared.levels[dimension], level)
        self._renew(shared, now)

    def _check_refused(self, need: Amounts) -> None:
        now = self._clock()
        for dimension, amount in need.items():
            refused = self._refused.get(dimension)
            if refused is None:
                continue
            least, at, again = refused
            if now >= again:
                del self._refused[dimension]
            elif amount >= least:
                raise self._error(dimension, amount, at - now)

    def _refuse(self, short: Shortage, need: Amounts) -> None:
        now = self._clock()
        amount = need[short.dimension]
        self._refused[short.dimension] = (amount, now + short.wait_s, now + min(_REFUSE_S, short.wait_s))
        raise self._error(short.dimension, amount, short.wait_s)

    def _error(self, dimension: Dimension, amount: float, wait_s: float) -> KvmeshError:
        limit, words = getattr(self.key.limits, dimension), _WORDS[dimension]
        who = f"key {self.key.id} of tenant {self.key.tenant}"
        if math.isinf(wait_s):
            return KvmeshError(
                ErrorCode.ERROR_CODE_RATE_LIMITED,
                f"{who} may use {limit} {words}, but this request alone takes {int(amount)}; "
                "send less, or ask for fewer tokens by max_tokens",
                retryable=False,
            )
        if dimension == "month":
            code, advice = ErrorCode.ERROR_CODE_QUOTA_EXHAUSTED, "the budget is used up until next month"
        else:
            code, advice = ErrorCode.ERROR_CODE_RATE_LIMITED, f"try again in {max(0.001, wait_s):.3g} s"
        return KvmeshError(
            code, f"{who} may use {limit} {words}; {advice}", retry_after_ms=max(1, math.ceil(wait_s * 1000))
        )
