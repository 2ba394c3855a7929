"""Prometheus metrics that only one thread changes, the event loop's: counting takes no lock and no checks.

For what is counted with every request or token.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import prometheus_client


class _Amount:
    """What a value of the library's is to those who read it."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0.0

    def get(self) -> float:
        return self.now

    def get_exemplar(self) -> None:
        """None is kept."""


class Counter(prometheus_client.Counter):
    """Of one thread; without exemplars."""

    _value: Any

    def _metric_init(self) -> None:
        super()._metric_init()
        self._value = _Amount()

    def inc(self, amount: float = 1, exemplar: dict[str, str] | None = None) -> None:
        """By 0 or more. Of a family with labels, only its members count: `labels`."""
        self._value.now += amount


class Gauge(prometheus_client.Gauge):
    """Of one thread, and of one process."""

    _value: Any

    def _metric_init(self) -> None:
        super()._metric_init()
        self._value = _Amount()

    def inc(self, amount: float = 1) -> None:
        self._value.now += amount

    def dec(self, amount: float = 1) -> None:
        self._value.now -= amount

    def set(self, value: float) -> None:
        self._value.now = float(value)


class Histogram(prometheus_client.Histogram):
    """Of one thread; without exemplars."""

    _sum: Any
    _buckets: list[Any]

    def _metric_init(self) -> None:
        super()._metric_init()
        self._sum = _Amount()
        self._buckets = [_Amount() for _ in self._upper_bounds]

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        # Bounds belong to their buckets; the last is infinite.
        self._buckets[bisect_left(self._upper_bounds, amount)].now += 1
        self._sum.now += amount
