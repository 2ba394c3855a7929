"""Notices that an HTTP client has left, while its answer is waited for as well as while it is written."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive


class ClientWatch:
    """`async with` around the work of a request whose body has been read.

    When the client leaves, the block is cancelled, `gone` is true, and execution goes on after the block.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.gone = False

    async def __aenter__(self) -> ClientWatch:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watch = asyncio.create_task(self._wait())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> bool:
        self._watch.cancel()
        if not self.gone:
            return False
        # Ours, unless somebody else wants the task cancelled, too.
        others = self._task.uncancel()
        return kind is asyncio.CancelledError and not others

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._task.cancel()
