"""How long a scheduler with nothing to compute sleeps: neither spinning nor past what it is to look at."""

from __future__ import annotations

import os
from typing import Any

import zmq

# What wakes nobody (room in the pool, a time-out) is looked at this often.
_LONGEST_MS = 5


class _Waiting:
    """What a scheduler with nothing to compute waits for: a message, or news of a hand-over or an offload."""

    def __init__(self, messages: Any, sleeper: Any) -> None:
        self.news = os.eventfd(0, os.EFD_NONBLOCK)
        self._poller = zmq.Poller()
        self._poller.register(messages, zmq.POLLIN)
        self._poller.register(self.news, zmq.POLLIN)
        # SGLang's own sleep, of a second: pages of an offload that is over would stay taken so long.
        if sleeper is not None:
            sleeper.poller.register(self.news, zmq.POLLIN)

    def wait(self) -> None:
        if any(ready == self.news for ready, _ in self._poller.poll(_LONGEST_MS)):
            os.eventfd_read(self.news)


# The scheduler's of this process, once it has first been idle.
_news_to: list[_Waiting] = []


def wait_for_progress(_result: None, scheduler: Any) -> None:
    """After `Scheduler.on_idle`: sleep until there is news or it is time to look again.

    SGLang sleeps by itself (`sleep_on_idle`) when nothing is live at all, and otherwise returns to
    its loop at once, which takes a whole core.
    """
    messages = scheduler.recv_from_tokenizer
    if messages is None:  # ranks other than the first wait in a collective for that one
        return
    if not _news_to:
        _news_to.append(_Waiting(messages, scheduler.idle_sleeper))
    _news_to[0].wait()


def tell_news(_result: None, _manager: Any, *_args: Any, **_kwargs: Any) -> None:
    """After a hand-over's status changed, in whichever thread learnt of it."""
    wake()


def wake() -> None:
    """Have the scheduler look at what has changed, if it sleeps. From any thread."""
    for waiting in _news_to:
        os.eventfd_write(waiting.news, 1)
