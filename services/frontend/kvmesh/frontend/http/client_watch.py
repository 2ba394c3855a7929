"""Notices that an HTTP client has left, while its answer is waited for as well as while it is written.

One that does not read has left when its request's time is over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from starlette.types import Scope

# Until it is looked once more whether the client of an answer that is over takes its end.
_LOOK_AGAIN_S = 0.5


class Connection(Protocol):
    """A request's connection, in its scope's state as `connection`."""

    def when_lost(self, callback: Callable[[], object] | None) -> None:
        """Call it, soon, once the client has left and the answer is not complete; None: do not."""
        ...

    def has_body(self) -> bool:
        """Whether the request's body has come whole."""
        ...

    def can_write(self, scope: Scope) -> bool:
        """Whether the answer to the request of `scope` goes on, in chunks, and its client keeps up."""
        ...

    def write(self, chunk: bytes) -> None:
        """The next bytes of that answer, at least one, not the last ones. Does not wait."""
        ...

    def cut_off_if_behind(self) -> bool:
        """Break the connection where its client does not keep up; whether it was broken."""
        ...

    @property
    def written_at(self) -> float:
        """The event loop's time of the last `write`."""
        ...


class ClientWatch:
    """`with` around the work of a request whose body has been read, in the task that does it.

    When the client leaves, the block is cancelled, `gone` is true, and execution goes on after the block.
    """

    def __init__(self, scope: Scope, deadline: float | None = None) -> None:
        """`deadline`, of `time.monotonic`: from then on a client that does not keep up is cut off, as its
        answer, which has ended, would wait for it with all it holds."""
        self._connection: Connection = scope["state"]["connection"]
        self._deadline = deadline
        self._timer: asyncio.TimerHandle | None = None
        self.gone = False

    def __enter__(self) -> ClientWatch:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._connection.when_lost(self._on_lost)
        if self._deadline is not None:
            self._look_in(max(0.0, self._deadline - time.monotonic()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> bool:
        self._connection.when_lost(None)
        if self._timer is not None:
            self._timer.cancel()
        if not self.gone:
            return False
        # Ours, unless somebody else wants the task cancelled, too.
        others = self._task.uncancel()
        return kind is asyncio.CancelledError and not others

    def _look_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        if not self._connection.cut_off_if_behind():
            # It may fall behind with the last words.
            self._look_in(_LOOK_AGAIN_S)

    def _on_lost(self) -> None:
        self.gone = True
        self._task.cancel()
