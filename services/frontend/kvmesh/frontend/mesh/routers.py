"""The replicas of the router, a stream to each: requests are spread, and one that dies is done without."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

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
}


class Answer(NamedTuple):
    """A placement, and who made it."""

    response: RouteResponse
    router: RouterLink


class Routers:
    """Belongs to one event loop."""

    def __init__(
        self, hub: StreamHub, addresses: Sequence[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`addresses` are not empty. `clock` is in seconds."""
        self._links = [RouterLink(hub, address) for address in addresses]
        self._clock = clock
        self._turn = 0

    def when_lost(self, callback: Callable[[RouterLink], object]) -> None:
        """Call `callback` each time a router's stream breaks."""
        for link in self._links:
            link.when_lost(callback)

    async def route(self, request: RouteRequest, left: float) -> Answer:
        """One router's answer, within the `left` seconds that the request still has.

        A router that is lost while it is asked, or cannot place the request, is no answer: the next is asked.
        Raises KvmeshError: a refusal, or what the last one failed with; UNAVAILABLE where none was asked, as
        all have said nothing of late.
        """
        deadline = self._clock() + left
        failure = KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, "no router answers; try again soon")
        for link in self._order():
            left = deadline - self._clock()
            if left <= 0:
                break
            request.deadline_ms = max(1, int(left * 1000))
            try:
                return Answer(await link.route(request, min(FIRST_WORD_S, left), left), link)
            except KvmeshError as error:
                if error.code not in ELSEWHERE:
                    raise
                failure = error
                if error.code == ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED and self._clock() < deadline:
                    link.silent_until = self._clock() + PAUSE_S
        raise failure

    def reachable(self, link: RouterLink) -> RouterLink:
        """`link`, or where what it should hear is better said now."""
        if not self._shaky(link):
            return link
        return next((other for other in self._links if not self._shaky(other)), link)

    def end(self) -> None:
        """Send what is due and no more."""
        for link in self._links:
            link.end()

    def _order(self) -> Iterable[RouterLink]:
        """Each in turn is the first; those that were lost of late are the last; those that say nothing are
        left alone."""
        at = self._turn = (self._turn + 1) % len(self._links)
        links = self._links[at:] + self._links[:at]
        now = self._clock()
        heard = [link for link in links if link.silent_until <= now]
        return sorted(heard, key=self._shaky)

    def _shaky(self, link: RouterLink) -> bool:
        now = self._clock()
        return link.silent_until > now or link.lost_at + PAUSE_S > now
