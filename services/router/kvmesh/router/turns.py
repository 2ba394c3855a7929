"""The time of the selectors: it stands still for a turn of the event loop, and says when to look about."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

# Milliseconds that a turn stands for: the clock has always moved on by the next.
GATHER_MS = 0.001
# Seconds between looks that nothing caused: leases expire, and what was speculated and not confirmed.
PERIOD_S = 1.0


class Turns:
    """Calls `tick` at the end of a turn that was begun, when a time has come that `due` says at a time, and
    about once a second. Belongs to one event loop. Milliseconds from 0 on; `clock` is in seconds."""

    def __init__(
        self,
        clock: Callable[[], float],
        tick: Callable[[], None],
        due: Callable[[float], Iterable[float]],
    ) -> None:
        self.clock = clock
        self.began = clock()
        self._tick = tick
        self._due = due
        # Of the turn under way: its time, and what ends it.
        self._turn_ms = 0.0
        self._turn: asyncio.Handle | None = None
        # And what looks about next, at that time of the loop: uvloop's handles do not always know theirs.
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._started = False

    def start(self) -> None:
        """Begin looking about; until then only turns cause ticks."""
        self._started = True
        self.arm()

    def close(self) -> None:
        """Nothing is called any more."""
        self._started = False
        for handle in (self._timer, self._turn):
            if handle is not None:
                handle.cancel()
        self._timer = self._turn = None

    @property
    def under_way(self) -> bool:
        """A turn has begun, so that a tick is to come."""
        return self._turn is not None

    def now(self) -> float:
        """Never falls."""
        if self._turn is not None:
            return self._turn_ms
        return max((self.clock() - self.began) * 1000, self._turn_ms)

    def begin(self) -> None:
        """Time stands still for what else this turn of the loop brings."""
        if self._turn is None:
            self._turn_ms = self.now()
            self._turn = asyncio.get_running_loop().call_soon(self._end)

    def arm(self) -> None:
        """Be there when the next time is due, and after a while if none is."""
        if not self._started:
            return
        now = self.now()
        delays = [(at - now) / 1000 for at in self._due(now)]
        loop = asyncio.get_running_loop()
        at = loop.time() + max(min([*delays, PERIOD_S]), 0.0)
        if self._timer is not None:
            if loop.time() < self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        self._timer = loop.call_at(at, self._on_timer)

    def _end(self) -> None:
        self._turn = None
        self._turn_ms += 2 * GATHER_MS
        self._tick()

    def _on_timer(self) -> None:
        self._timer = None
        self._tick()
