"""The answers to one request: every choice of every prompt, generated side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from types import TracebackType

from kvmesh.frontend.mesh.mesh import Mesh
from kvmesh.frontend.serving.call import Call
from kvmesh.frontend.serving.session import Session
from kvmesh.frontend.serving.text import Delta, Outlet, TextAnswer, TextOptions

# An answer's number, what came of it, and, where it has failed, why.
_Event = tuple[int, Delta] | BaseException


class Answers:
    """A context: leaving it ends whatever still runs. The answers are numbered as the calls are."""

    def __init__(
        self,
        mesh: Mesh,
        calls: Sequence[Call],
        options: Callable[[int], TextOptions],
        choices: int = 1,
        ignored: Sequence[str] = (),
    ) -> None:
        """`calls`: of each prompt its `choices`, prompt after prompt; `options` are those of an answer."""
        self.call = calls[0]
        """the first: what all have in common can be read from it"""
        self.choices = choices
        self.ignored = ignored
        """names of fields that change nothing, though others of their kind do"""
        self.sessions: list[Session] = []
        """one an answer, inside the context"""
        self._mesh = mesh
        self._calls = calls
        self._options = options
        self._answers: list[TextAnswer] = []

    def __len__(self) -> int:
        """Choices of all prompts."""
        return len(self._calls)

    def __enter__(self) -> Answers:
        self.sessions = [Session(self._mesh, call) for call in self._calls]
        self._answers = [TextAnswer(session, self._options(i), i) for i, session in enumerate(self.sessions)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        for answer in self._answers:
            answer.close()

    def matched(self, number: int) -> str | None:
        """The stop string that ended an answer."""
        return self._answers[number].matched

    def echoed(self, number: int) -> int:
        """Characters at an answer's beginning that are its prompt's."""
        return len(self._options(number).echo or "")

    @property
    def reasoning_tokens(self) -> int:
        """Of all answers, as far as they have come."""
        return sum(answer.reasoning_tokens for answer in self._answers)

    def deltas(self, outlet: Outlet | None = None) -> AsyncGenerator[tuple[int, Delta]]:
        """What comes of any of them, in the order in which it comes; it must be closed.

        Of an only one, `outlet` may take what comes while this is waited for.
        Raises KvmeshError when one cannot be completed: then none is.
        """
        return self._answers[0].deltas(outlet) if len(self._answers) == 1 else self._all()

    async def _all(self) -> AsyncGenerator[tuple[int, Delta]]:
        # Bounded: whoever is ahead of the client waits.
        events: asyncio.Queue[_Event] = asyncio.Queue(len(self._answers))
        tasks = [asyncio.create_task(self._pump(i, events)) for i in range(len(self._answers))]
        left = len(tasks)
        try:
            while left:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                left -= bool(event[1].finish_reason)
                yield event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, number: int, events: asyncio.Queue[_Event]) -> None:
        try:
            async with aclosing(self._answers[number].deltas()) as deltas:
                async for event in deltas:
                    await events.put(event)
        except Exception as error:
            await events.put(error)
