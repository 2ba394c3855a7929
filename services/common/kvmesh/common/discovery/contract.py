"""Discovery: which workers are alive, and what each says about itself.

Membership is a lease that the worker renews; a worker that stops renewing is gone after the TTL, one that
deregisters at once. Implementations: `nats` (leases in a JetStream KV bucket), `static` (a list of workers).
`tests/contract/test_discovery.py` runs them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType

import structlog

from kvmesh.v1.common_pb2 import WorkerInfo

log = structlog.get_logger()


class Discovery(ABC):
    """A process's view of the members, and at most one registration of its own. Belongs to one event loop."""

    def __init__(self) -> None:
        self._members: dict[str, WorkerInfo] = {}
        self._view = MappingProxyType(self._members)
        self._callbacks: list[Callable[[], None]] = []
        # Grows whenever a worker joins, leaves, restarts, moves, or changes its role or state; not with its
        # load, which changes all the time.
        self.generation = 0

    @abstractmethod
    async def start(self) -> None:
        """Begin watching; returns at once, whether or not anything is reachable."""

    @abstractmethod
    async def register(self, info: Callable[[], WorkerInfo]) -> None:
        """Keep a lease alive with the value of `info()` at every heartbeat, until `deregister` or `close`.

        Returns at once; while the registry is unreachable the lease is taken as soon as it is back.
        Calling it again replaces the value and renews now, e.g. after a change of state.
        """

    @abstractmethod
    async def deregister(self) -> None:
        """Give the lease back; others see the worker leave at once. Idempotent; takes two seconds at most."""

    @abstractmethod
    async def close(self) -> None:
        """Deregister and stop watching. Idempotent."""

    def workers(self) -> Mapping[str, WorkerInfo]:
        """The live workers by id: a view that changes in place. Values must not be modified.

        While the registry is unreachable this is the last known state; nobody expires.
        """
        return self._view

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call `callback` after every change of any worker's registration, its load included."""
        self._callbacks.append(callback)

    def _put(self, info: WorkerInfo) -> None:
        old = self._members.get(info.id)
        if old is None or old.incarnation != info.incarnation:
            log.info(
                "worker joined", worker=info.id, address=info.address, incarnation=f"{info.incarnation:x}"
            )
        elif old == info:
            return
        if old is None or _identity(old) != _identity(info):
            self.generation += 1
        self._members[info.id] = info
        self._changed()

    def _drop(self, worker_id: str, why: str) -> None:
        if self._members.pop(worker_id, None) is not None:
            log.info("worker left", worker=worker_id, why=why)
            self.generation += 1
            self._changed()

    def _changed(self) -> None:
        for callback in self._callbacks:
            try:
                callback()
            except Exception:
                log.exception("discovery callback failed")


def _identity(info: WorkerInfo) -> tuple[object, ...]:
    return info.incarnation, info.address, info.role, info.state, info.node
