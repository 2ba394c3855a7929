"""The replicas of the router, a stream to each: requests are spread, and one that dies is done without.

Replicas come and go as the directory says. One that is gone answers what it was asked, and is asked no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvmesh.common.discovery.routers import RouterDirectory
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.streams import StreamHub
from kvmesh.frontend.mesh.router_link import RouterLink
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import RouteRequest, RouteResponse

# Seconds until a router says something; it may be that the request waits.
FIRST_WORD_S = 2.0
# A router that was lost, or said nothing, is the last to be asked for this long.
PAUSE_S = 1.0

# A router that cannot answer, or knows less than others do (it has just started).
ELSEWHERE = {
    ErrorCode.ERROR_CODE_UNAVAILABLE,
    ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED,
    ErrorCode.ERROR_CODE_CANCELLED,
    ErrorCode.ERROR_CODE_INTERNAL,
    ErrorCode.ERROR_CODE_NO_WORKER_READY,
    ErrorCode.ERROR_CODE_MODEL_NOT_FOUND,
    ErrorCode.ERROR_CODE_UNSUPPORTED,
}


class Answer(NamedTuple):
    """A placement, and who made it."""

    response: RouteResponse
    router: RouterLink


class Routers:
    """Belongs to one event loop."""

    def __init__(
        self, hub: StreamHub, directory: RouterDirectory, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` is in seconds."""
        self._hub = hub
        self._directory = directory
        # Those that are there or still have a stream, by address; and those that are there.
        self._known: dict[str, RouterLink] = {}
        self._links: list[RouterLink] = []
        self._lost: list[Callable[[RouterLink], object]] = []
        self._clock = clock
        self._turn = 0
        directory.subscribe(self._on_change)
        self._on_change()

    def when_lost(self, callback: Callable[[RouterLink], object]) -> None:
        """Call `callback` each time a router's stream breaks."""
        self._lost.append(callback)

    async def route(self, request: RouteRequest, deadline: float, first_by: float | None = None) -> Answer:
        """One router's answer, before the request's `deadline`; its first token is wanted at `first_by`, or
        by then. Both are times of the clock.

        A router that is lost while it is asked, or cannot place the request, is no answer: the next is asked.
        Raises KvmeshError: a refusal, or what the last one failed with; UNAVAILABLE where none was asked, as
        all have said nothing of late, or there is none.
        """
        failure: KvmeshError | None = None
        for link in self._order():
            left = deadline - self._clock()
            if left <= 0:
                break
            until_first = left if first_by is None else min(first_by - self._clock(), left)
            request.deadline_ms = max(1, int(until_first * 1000))
            try:
                return Answer(await link.route(request, min(FIRST_WORD_S, left), left), link)
            except KvmeshError as error:
                if error.code not in ELSEWHERE:
                    raise
                failure = error
                if error.code == ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED and self._clock() < deadline:
                    link.silent_until = self._clock() + PAUSE_S
        raise failure or KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, "no router answers; try again soon")

    def reachable(self, link: RouterLink) -> RouterLink:
        """`link`, or where what it should hear is better said now."""
        if link in self._links and not self._shaky(link):
            return link
        return next((other for other in self._links if not self._shaky(other)), link)

    def end(self) -> None:
        """Send what is due and no more."""
        for link in self._known.values():
            link.end()

    def _order(self) -> Iterable[RouterLink]:
        """Each in turn is the first; those that were lost of late are the last; those that say nothing are
        left alone."""
        if len(self._links) == 1:
            return [link for link in self._links if link.silent_until <= self._clock()]
        at = self._turn = (self._turn + 1) % max(len(self._links), 1)
        links = self._links[at:] + self._links[:at]
        now = self._clock()
        heard = [link for link in links if link.silent_until <= now]
        return sorted(heard, key=self._shaky)

    def _on_change(self) -> None:
        """Take the directory's view over. The stream to a router that is gone is that router's to end."""
        before, self._links = self._links, [self._link(address) for address in self._directory.addresses]
        for link in before:
            if link not in self._links:
                self._on_lost(link)

    def _link(self, address: str) -> RouterLink:
        link = self._known.get(address)
        if link is None:
            link = self._known[address] = RouterLink(self._hub, address)
            link.when_lost(self._on_lost)
        return link

    def _on_lost(self, link: RouterLink) -> None:
        for callback in self._lost:
            callback(link)
        if link not in self._links and not link.connected:
            self._known.pop(link.address, None)

    def _shaky(self, link: RouterLink) -> bool:
        now = self._clock()
        return link.silent_until > now or link.lost_at + PAUSE_S > now
