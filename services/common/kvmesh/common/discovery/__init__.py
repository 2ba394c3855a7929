"""Who is there. Workers: `contract` says what discovery is, `nats` and `static` do it. `routers`: routers."""

from __future__ import annotations

from kvmesh.common.bus import Bus
from kvmesh.common.config import Config
from kvmesh.common.discovery.contract import Discovery
from kvmesh.common.tls import MeshTls


def make_discovery(config: Config, bus: Bus) -> Discovery:
    """The discovery the configuration asks for."""
    if config.discovery.kind == "static":
        from kvmesh.common.discovery.static import StaticDiscovery

        return StaticDiscovery(config.discovery, MeshTls.of(config.tls))
    from kvmesh.common.discovery.nats import NatsDiscovery

    return NatsDiscovery(config.discovery, bus)


__all__ = ["Discovery", "make_discovery"]
