"""W3C trace context: which trace the running code belongs to.

The context lives in a `contextvars` variable, so every asyncio task inherits it from its creator.
Kept apart from OpenTelemetry so that ids correlate logs and cross processes without an exporter.
"""

from __future__ import annotations

import random
import re
from contextvars import ContextVar
from typing import NamedTuple

TRACEPARENT = "traceparent"

_FORMAT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


class TraceContext(NamedTuple):
    """One span's identity: 128-bit trace, 64-bit span, flags (1: sampled)."""

    trace_id: int
    span_id: int
    flags: int = 1

    def __str__(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags:02x}"

    def child(self) -> TraceContext:
        return TraceContext(self.trace_id, _random_id(64), self.flags)


CURRENT: ContextVar[TraceContext | None] = ContextVar("kvmesh_trace", default=None)


def new() -> TraceContext:
    """The root of a new trace."""
    return TraceContext(_random_id(128), _random_id(64))


def parse(traceparent: str) -> TraceContext | None:
    """The context a `traceparent` header names; None when absent or malformed, which W3C wants ignored."""
    match = _FORMAT.fullmatch(traceparent)
    if match is None or match[1] == "ff" or (match[1] == "00" and len(traceparent) != 55):
        return None
    context = TraceContext(int(match[2], 16), int(match[3], 16), int(match[4], 16))
    return context if context.trace_id and context.span_id else None


def _random_id(bits: int) -> int:
    # An id of zero is invalid.
    return random.getrandbits(bits) or 1
