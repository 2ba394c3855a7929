"""SIGTERM and SIGINT: the first asks for an orderly stop, the second ends the process at once."""

from __future__ import annotations

import asyncio
import os
import signal

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """The stop request of one event loop.

    A signal that comes while nobody waits (a model is being loaded, say) cancels the main task, so that
    start-up need not ask again and again whether it is still wanted.
    """

    def __init__(self, main: asyncio.Task[None] | None = None) -> None:
        self._main = main
        self._asked = asyncio.Event()
        self._waiting = 0

    def install(self) -> None:
        """Take the signals over; only from the main thread."""
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    def uninstall(self) -> None:
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    async def wait(self) -> None:
        """Return once the process has been asked to stop."""
        self._waiting += 1
        try:
            await self._asked.wait()
        finally:
            self._waiting -= 1

    def _on_signal(self, number: int) -> None:
        if self._asked.is_set():
            # Nothing is flushed or closed: whoever asks twice wants the process gone.
            os._exit(128 + number)
        self._asked.set()
        if not self._waiting and self._main is not None:
            self._main.cancel()
