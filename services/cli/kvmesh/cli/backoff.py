"""How long to wait before a process that died is started again."""

from __future__ import annotations

FIRST_S = 0.5
LIMIT_S = 10.0
# A process that was healthy this long starts again from the first delay.
HEALTHY_S = 60.0


class Backoff:
    """0.5 s, doubled at every exit up to 10 s."""

    def __init__(self) -> None:
        self._next_s = FIRST_S

    def delay_s(self, healthy_s: float) -> float:
        """The pause after an exit; `healthy_s` is how long the process had been ready."""
        if healthy_s >= HEALTHY_S:
            self._next_s = FIRST_S
        delay = self._next_s
        self._next_s = min(2 * delay, LIMIT_S)
        return delay
