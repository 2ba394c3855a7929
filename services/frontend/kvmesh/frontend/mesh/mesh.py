"""Every way out of the frontend: a stream to each router, and to each worker in use."""

from __future__ import annotations

from typing import Protocol

from kvmesh.common.config import Config
from kvmesh.common.discovery.contract import Discovery
from kvmesh.common.discovery.routers import RouterDirectory
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.streams import StreamHub
from kvmesh.common.tls import MeshTls
from kvmesh.frontend.mesh.fallback import FallbackPlacement
from kvmesh.frontend.mesh.link import Link
from kvmesh.frontend.mesh.placement import Placer
from kvmesh.frontend.mesh.routers import Routers
from kvmesh.v1.router_pb2 import WorkerRef

# Seconds the routers have to take the last reports.
_LAST_REPORTS_S = 0.5
# A worker's process (its incarnation) and which of its two streams.
_LinkKey = tuple[str, int, bool]


class LiveRequest(Protocol):
    """A request as the process at large sees it: how far it is, and how to end it."""

    output_tokens: int

    def abort(self, error: KvmeshError) -> None: ...


class Mesh:
    """Shared by all requests of the process. Belongs to one event loop."""

    def __init__(self, config: Config, discovery: Discovery, routers: RouterDirectory) -> None:
        self._hub = StreamHub(tls=MeshTls.of(config.tls))
        self._routers = Routers(self._hub, routers)
        self._links: dict[_LinkKey, Link] = {}
        self.placer = Placer(self._routers, FallbackPlacement(discovery))
        # Seconds an answer waits for a worker to go on at.
        self.recovery_s = config.frontend.recovery_s
        # Seconds for which a worker that is gone may still be listed.
        self.listed_s = config.discovery.ttl_s + config.discovery.heartbeat_s
        # Requests alive now.
        self.sessions: set[LiveRequest] = set()

    def link(self, worker: WorkerRef, *, prefill: bool) -> Link:
        """The stream to a worker, opened at first use and after it broke."""
        key = (worker.id, worker.incarnation, prefill)
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = Link(self._hub, worker.id, worker.address, prefill=prefill)
            link.when_closed(lambda: self._links.pop(key, None))
        return link

    def abort_all(self, error: KvmeshError) -> None:
        """End every live request with an error."""
        for session in list(self.sessions):
            session.abort(error)

    async def close(self) -> None:
        """End all streams and free all leases."""
        for link in list(self._links.values()):
            link.close()
        self.placer.leases.close()
        self._routers.end()
        # The last reports must reach the wire.
        await self._hub.drained(_LAST_REPORTS_S)
        self._hub.close()
