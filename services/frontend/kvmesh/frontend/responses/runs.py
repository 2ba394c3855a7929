"""Responses that are generated in the background, whether or not a client listens.

One process generates each, and tells the others of it in the journal: there they follow it, and ask for its
end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import structlog

from kvmesh.common import telemetry
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.frontend.responses.generation import Generation
from kvmesh.frontend.responses.kept import Kept, KeptResponse, lost
from kvmesh.frontend.responses.output import frame
from kvmesh.frontend.responses.response import LIVE
from kvmesh.frontend.store.journal import Journal, Progress
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

# At once, in one process: each keeps its events until it ends.
_MOST = 1_024
# Seconds between two reports, and between two looks of those who follow.
_REPORT_S = 0.2
# Events that are read at once.
_PAGE = 1_000


class Run:
    """One that this process generates; its events are kept for those who listen, until it has ended."""

    def __init__(self, generation: Generation, owner: str) -> None:
        self.generation = generation
        self.owner = owner
        self._frames: list[bytes] = []
        self._reported = 0
        self._changed = asyncio.Event()
        self._closed = False
        self._task = asyncio.create_task(self._drive(), name="response")

    async def follow(self, first: int = 0) -> AsyncGenerator[bytes]:
        """The events from the number `first` on, until the last."""
        at = first
        while True:
            changed = self._changed
            while at < len(self._frames):
                yield self._frames[at]
                at += 1
            if self._closed:
                return
            await changed.wait()

    async def cancel(self) -> None:
        """Return when it has ended; one that has, stays as it is."""
        self._task.cancel()
        await self.ended()
        await self.generation.cancel()
        self._close()

    async def ended(self) -> None:
        await asyncio.gather(self._task, return_exceptions=True)

    def progress(self) -> Progress:
        """What has not been reported."""
        response, first = self.generation.response, self._reported
        return Progress(response["id"], response["status"], first, self._frames[first:], self._closed)

    def reported(self, progress: Progress) -> None:
        self._reported = progress.first + len(progress.events)

    async def _drive(self) -> None:
        generation = self.generation
        try:
            with telemetry.span("generate", request_id=generation.answers.call.request_id):
                async with aclosing(generation.events()) as events:
                    async for event in events:
                        self._frames.append(frame(event))
                        self._tell()
        except Exception:
            log.exception("background response failed", response_id=generation.response["id"])
            internal = "internal error; the log has it by the response's id"
            await generation.fail(KvmeshError(ErrorCode.ERROR_CODE_INTERNAL, internal))
        self._close()

    def _close(self) -> None:
        """Once it is stored as it ended."""
        self._closed = True
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Runs:
    """Those of one process, and the way to those of others."""

    def __init__(self, journal: Journal, kept: Kept) -> None:
        self._journal = journal
        self._kept = kept
        self._live: dict[str, Run] = {}
        self._reports: asyncio.Task[None] | None = None

    async def start(self, generation: Generation, owner: str) -> Run:
        """Store it, then begin. Raises KvmeshError: OVERLOADED, or why it cannot be stored."""
        if len(self._live) >= _MOST:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_OVERLOADED,
                f"{_MOST} responses are generated in the background already; try again later",
            )
        id = generation.response["id"]
        await self._journal.open(id, generation.response["status"])
        await generation.keep()
        run = self._live[id] = Run(generation, owner)
        if self._reports is None or self._reports.done():
            self._reports = asyncio.create_task(self._keep_reporting(), name="responses")
        return run

    def find(self, owner: str, id: str) -> Run | None:
        """One of this process that was live a moment ago."""
        run = self._live.get(id)
        return run if run is not None and run.owner == owner else None

    async def follow(self, owner: str, id: str, first: int) -> AsyncGenerator[bytes]:
        """The events of one, from the number `first` on, whoever generates it. Raises KvmeshError before the
        first where there are none any more."""
        run = self.find(owner, id)
        if run is not None:
            async with aclosing(run.follow(first)) as events:
                async for event in events:
                    yield event
            return
        at = first
        while True:
            seen = await self._journal.read(id, at, _PAGE)
            if seen is None:
                if at == first:
                    raise invalid(
                        "only a response that is being generated in the background, or was minutes ago, "
                        "can be streamed",
                        "stream",
                    )
                return
            for event in seen.events:
                yield event
            at += len(seen.events)
            if len(seen.events) == _PAGE:
                continue
            if seen.closed:
                return
            if lost(seen):
                # Then it is stored as failed.
                response = (await self._kept.get(owner, id)).response
                yield frame({"type": "response.failed", "response": response, "sequence_number": at})
                return
            await asyncio.sleep(_REPORT_S)

    async def cancel(self, owner: str, id: str) -> KeptResponse:
        """Return when it has ended; one that has, stays as it is. Raises KvmeshError."""
        run = self.find(owner, id)
        if run is not None:
            await run.cancel()
        else:
            await self._journal.end(id)
        while True:
            kept = await self._kept.get(owner, id)
            if kept.response["status"] not in LIVE:
                return kept
            await asyncio.sleep(_REPORT_S / 4)

    async def forget(self, owner: str, id: str) -> None:
        """One that is not kept any more; it ends, and nobody can follow it."""
        await self._journal.forget(id)
        run = self.find(owner, id)
        if run is not None:
            await run.cancel()

    async def ended(self) -> None:
        """Return when none is left, and others know it."""
        await asyncio.gather(*(run.ended() for run in list(self._live.values())))
        if self._reports is not None:
            self._reports.cancel()
            await asyncio.gather(self._reports, return_exceptions=True)
        if self._live:
            await self._report()

    async def _keep_reporting(self) -> None:
        while self._live:
            await asyncio.sleep(_REPORT_S)
            await self._report()

    async def _report(self) -> None:
        progress = [run.progress() for run in self._live.values()]
        try:
            unwanted = await self._journal.report(progress)
        except KvmeshError as error:
            # All of it is in the next one.
            log.warning("background responses not reported", error=error.message)
            return
        for one in progress:
            self._live[one.id].reported(one)
            if one.closed:
                del self._live[one.id]
        await asyncio.gather(*(self._live[id].cancel() for id in unwanted if id in self._live))
