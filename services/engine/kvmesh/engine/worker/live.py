"""One request of a caller's stream, from its start command to its finish."""

from __future__ import annotations

import asyncio
import contextvars
from dataclasses import asdict

from kvmesh.common.errors import KvmeshError
from kvmesh.common.telemetry import span
from kvmesh.engine.contract import CachedTokens, Engine, Timing


class LiveRequest:
    """`id` is the caller's name for it, `handle` the engine's.

    Its span is open for as long as it lives, in a context of its own: many spans overlap on one stream.
    """

    __slots__ = ("_span", "context", "deadline", "engine", "handle", "id", "override")

    def __init__(self, request_id: int, method: str, traceparent: str, mesh_id: str) -> None:
        self.id = request_id
        # Set once it is submitted.
        self.engine: Engine
        self.handle = 0
        # Why it was aborted; takes the place of the engine's CANCELLED.
        self.override: KvmeshError | None = None
        self.deadline: asyncio.TimerHandle | None = None
        self.context = contextvars.copy_context()
        self._span = span(method, parent=traceparent, request_id=mesh_id)
        self.context.run(self._span.__enter__)

    def note(self, cached: CachedTokens | None, timing: Timing | None) -> None:
        """Put on the span what the engine reports: prompt tokens by the tier they came from, and times."""
        if not self._span.recorded:
            return
        if cached is not None:
            self._span.set(**{f"cached_tokens.{name}": tokens for name, tokens in asdict(cached).items()})
        if timing is not None:
            self._span.set(**asdict(timing))

    def end(self, error: KvmeshError | None = None) -> None:
        """Close the span and the timer; call once."""
        if self.deadline is not None:
            self.deadline.cancel()
        self.context.run(self._span.__exit__, type(error) if error else None, error, None)
