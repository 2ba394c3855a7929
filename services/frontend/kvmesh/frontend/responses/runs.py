"""Responses that are generated in the background, whether or not a client listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import structlog

from kvmesh.common import telemetry
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.responses.generation import Generation
from kvmesh.frontend.responses.output import Event
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

# At once, in one process: each keeps its events until it ends.
_MOST = 1_024


class Run:
    """One of them; its events are kept for those who listen, until it has ended."""

    def __init__(self, generation: Generation, owner: str) -> None:
        self.generation = generation
        self.owner = owner
        self._events: list[Event] = []
        self._changed = asyncio.Event()
        self._done = False
        self._task = asyncio.create_task(self._drive(), name="response")

    async def follow(self, after: int = -1) -> AsyncGenerator[Event]:
        """The events whose numbers are larger than `after`, until the last."""
        at = after + 1
        while True:
            changed = self._changed
            while at < len(self._events):
                yield self._events[at]
                at += 1
            if self._done:
                return
            await changed.wait()

    async def cancel(self) -> None:
        """Return when it has ended; one that has, stays as it is."""
        self._task.cancel()
        await self.ended()
        await self.generation.cancel()
        # A task may be cancelled before it has begun.
        self._done = True
        self._tell()

    def when_ended(self, callback: Callable[[], object]) -> None:
        self._task.add_done_callback(lambda _: callback())

    async def ended(self) -> None:
        await asyncio.gather(self._task, return_exceptions=True)

    async def _drive(self) -> None:
        generation = self.generation
        try:
            with telemetry.span("generate", request_id=generation.answers.call.request_id):
                async with aclosing(generation.events()) as events:
                    async for event in events:
                        self._events.append(event)
                        self._tell()
        except Exception:
            log.exception("background response failed", response_id=generation.response["id"])
            internal = "internal error; the log has it by the response's id"
            await generation.fail(KvmeshError(ErrorCode.ERROR_CODE_INTERNAL, internal))
        finally:
            self._done = True
            self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Runs:
    """Those of one process."""

    def __init__(self) -> None:
        self._live: dict[str, Run] = {}

    async def start(self, generation: Generation, owner: str) -> Run:
        """Store it, then begin. Raises KvmeshError: OVERLOADED, or why it cannot be stored."""
        if len(self._live) >= _MOST:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_OVERLOADED,
                f"{_MOST} responses are generated in the background already; try again later",
            )
        await generation.keep()
        id = generation.response["id"]
        run = self._live[id] = Run(generation, owner)
        run.when_ended(lambda: self._live.pop(id, None))
        return run

    def find(self, owner: str, id: str) -> Run | None:
        """A run that has not ended."""
        run = self._live.get(id)
        return run if run is not None and run.owner == owner else None

    async def ended(self) -> None:
        """Return when none is left."""
        await asyncio.gather(*(run.ended() for run in list(self._live.values())))
