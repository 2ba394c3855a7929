"""Where the routers are: as configured, or those that have registered.

A router registers as a worker does, by a lease in a JetStream KV bucket; configured addresses are taken as
they are, alive or not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import structlog
from google.protobuf.message import DecodeError

from kvmesh.common.bus import Bus
from kvmesh.common.config import Config
from kvmesh.common.discovery.leases import LeaseBucket
from kvmesh.v1.router_pb2 import RouterInfo

log = structlog.get_logger()


class RouterDirectory:
    """Configured addresses, which never change. Belongs to one event loop."""

    def __init__(self, addresses: Sequence[str] = ()) -> None:
        self._addresses = tuple(addresses)
        self._callbacks: list[Callable[[], None]] = []

    async def start(self) -> None:
        """Begin watching; returns at once, whether or not anything is reachable."""

    async def close(self) -> None:
        """Stop watching. Idempotent."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """host:port of every router, in an order that stays; while the registry is away, those last known."""
        return self._addresses

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call `callback` after every change of the addresses."""
        self._callbacks.append(callback)


class RegisteredRouters(RouterDirectory):
    """The routers that renew their leases."""

    def __init__(self, config: Config, bus: Bus) -> None:
        super().__init__()
        discovery = config.discovery
        self._leases = LeaseBucket(discovery, bus, discovery.routers_bucket, self._put, self._drop)
        self._routers: dict[str, RouterInfo] = {}

    async def start(self) -> None:
        await self._leases.watch()

    async def register(self, info: RouterInfo) -> None:
        """Keep this router's lease alive until `close`. Returns at once; see `Discovery.register`."""
        await self._leases.hold(info.id, info.SerializeToString)

    async def close(self) -> None:
        await self._leases.close()

    def _put(self, router_id: str, payload: bytes) -> bool:
        info = read_router(router_id, payload)
        if info is None:
            return False
        old = self._routers.get(router_id)
        if old is None or old.incarnation != info.incarnation:
            log.info("router joined", router=router_id, address=info.address)
        self._routers[router_id] = info
        self._update()
        return True

    def _drop(self, router_id: str, why: str) -> None:
        if self._routers.pop(router_id, None) is not None:
            log.info("router left", router=router_id, why=why)
            self._update()

    def _update(self) -> None:
        # By their ids, so that a restart at another address keeps its place.
        addresses = tuple(dict.fromkeys(info.address for _, info in sorted(self._routers.items())))
        if addresses != self._addresses:
            self._addresses = addresses
            for callback in self._callbacks:
                callback()


def read_router(router_id: str, payload: bytes) -> RouterInfo | None:
    """A registration; None for one that cannot be read or is another's."""
    try:
        info = RouterInfo.FromString(payload)
    except DecodeError:
        log.warning("unreadable registration ignored", router=router_id, bytes=len(payload))
        return None
    if info.id != router_id or not info.address:
        log.warning("registration under another id ignored", key=router_id, router=info.id)
        return None
    return info


def router_id(node: str, port: int) -> str:
    """What a router registers as: the same in every life, and a key that NATS takes."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", f"router-{node}-{port}")


def make_router_directory(config: Config, bus: Bus) -> RouterDirectory:
    """Of the configured addresses if there are any; without a registry this configuration's own router."""
    if config.router.addresses() or config.discovery.kind != "nats":
        return RouterDirectory(config.router.effective_addresses())
    return RegisteredRouters(config, bus)
