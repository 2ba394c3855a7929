"""Notices that an HTTP client has left, while its answer is waited for as well as while it is written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from starlette.types import Scope


class Connection(Protocol):
    """A request's connection, in its scope's state as `connection`."""

    def when_lost(self, callback: Callable[[], object] | None) -> None:
        """Call it, soon, once the client has left and the answer is not complete; None: do not."""
        ...

    def has_body(self) -> bool:
        """Whether the request's body has come whole."""
        ...


class ClientWatch:
    """`with` around the work of a request whose body has been read, in the task that does it.

    When the client leaves, the block is cancelled, `gone` is true, and execution goes on after the block.
    """

    def __init__(self, scope: Scope) -> None:
        self._connection: Connection = scope["state"]["connection"]
        self.gone = False

    def __enter__(self) -> ClientWatch:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._connection.when_lost(self._on_lost)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> bool:
        self._connection.when_lost(None)
        if not self.gone:
            return False
        # Ours, unless somebody else wants the task cancelled, too.
        others = self._task.uncancel()
        return kind is asyncio.CancelledError and not others

    def _on_lost(self) -> None:
        self.gone = True
        self._task.cancel()
