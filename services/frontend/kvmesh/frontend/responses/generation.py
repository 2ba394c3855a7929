"""One response, from its first event to its last, and its place in the store."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import structlog

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.protocol.renamed import rename
from kvmesh.frontend.responses.kept import Kept
from kvmesh.frontend.responses.output import Event, Output, frame
from kvmesh.frontend.responses.request import NAMES, ResponsesRequest
from kvmesh.frontend.responses.response import LIVE, new_response, response_error, response_usage
from kvmesh.frontend.serving.answers import Answers
from kvmesh.frontend.serving.explain import explanation_json
from kvmesh.frontend.store.contract import Record

log = structlog.get_logger()


class Generation:
    """Driven once, by `events`. `response` is the object as far as it has come."""

    def __init__(
        self,
        answers: Answers,
        body: ResponsesRequest,
        items: list[dict[str, Any]],
        tier: str,
        kept: Kept,
        owner: str,
    ) -> None:
        """`items`: the response's own input, as it is kept."""
        self.answers = answers
        self.background = bool(body.background)
        self.response = new_response(body, answers.call.model.name, tier)
        self._items = items
        self._kept, self._owner = kept, owner
        self._stored = body.stored()
        # Whether there is anybody to tell of a failure but by the status of the answer.
        self._tells = bool(body.stream) or self.background
        self._output = Output(sealed=body.sealed())
        self._number = 0
        # As it was stored when it began, where it is generated in the background.
        self._begun: Record | None = None
        if self.background:
            self.response["status"] = "queued"

    async def keep(self) -> None:
        """Store it before it begins. Raises KvmeshError."""
        self._begun = await self._kept.put(self._owner, self.response, self._items)

    async def events(self) -> AsyncGenerator[Event]:
        """All of them, numbered; it must be closed. The response is stored before the last one.

        Raises KvmeshError where nobody can be told by an event: before the first one, and for an answer that
        is sent whole. Then nothing is stored.
        """
        try:
            with self.answers as answers:
                async with aclosing(answers.deltas()) as deltas:
                    if self.background:
                        yield self._snapshot("created")
                        yield self._snapshot("queued")
                    _, delta = await anext(deltas)
                    self.response["status"] = "in_progress"
                    if not self.background:
                        yield self._snapshot("created")
                    yield self._snapshot("in_progress")
                    while True:
                        for event in self._output.add(delta):
                            yield self._numbered(event)
                        if delta.finish_reason:
                            break
                        _, delta = await anext(deltas)
            whole = delta.finish_reason != "length"
            for event in self._output.close("completed" if whole else "incomplete"):
                yield self._numbered(event)
            self._end("completed" if whole else "incomplete")
            if self._stored:
                await self._keep_end()
        except KvmeshError as error:
            rename(error, NAMES)
            if not self._tells or (not self._number and not self.background):
                raise
            await self.fail(error)
        yield self._snapshot(self.response["status"])

    async def frames(self) -> AsyncGenerator[bytes]:
        """The events as they are sent."""
        async with aclosing(self.events()) as events:
            async for event in events:
                yield frame(event)

    async def result(self) -> dict[str, Any]:
        """The response, when it has ended. Raises KvmeshError."""
        async with aclosing(self.events()) as events:
            async for _ in events:
                pass
        return self.response

    async def cancel(self) -> None:
        """After `events` was broken off for good; what had ended stays as it is."""
        if self.response["status"] in LIVE:
            self._break_off("cancelled")
        await self._keep_last()

    async def fail(self, error: KvmeshError) -> None:
        log.warning("response failed", response_id=self.response["id"], error=error.message)
        self.response["error"] = response_error(error)
        self._break_off("failed")
        await self._keep_last()

    def _break_off(self, status: str) -> None:
        if self._output.items:
            self._output.close("incomplete")
        self._end(status)

    def _end(self, status: str) -> None:
        self.response["status"] = status
        self.response["output"] = self._output.items
        if status == "completed":
            self.response["completed_at"] = int(time.time())
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        session = self.answers.sessions[0] if self.answers.sessions else None
        if session is not None and session.started:
            self.response["usage"] = response_usage(self.answers)
            if self.answers.call.explain:
                self.response["kvmesh"] = explanation_json(session)

    async def _keep_last(self) -> None:
        """The end of what cannot fail once more."""
        if not self._stored:
            return
        try:
            await self._keep_end()
        except KvmeshError as error:
            log.error("response not stored", response_id=self.response["id"], error=error.message)

    async def _keep_end(self) -> None:
        if self._begun is not None:
            await self._kept.finish(self._begun, self.response, self._items)
        else:
            await self._kept.put(self._owner, self.response, self._items)

    def _snapshot(self, what: str) -> Event:
        # A copy: the response goes on growing.
        return self._numbered({"type": f"response.{what}", "response": dict(self.response)})

    def _numbered(self, event: Event) -> Event:
        event["sequence_number"] = self._number
        self._number += 1
        return event
