"""`python -m kvmesh.router [--config FILE]`: the router process."""

from __future__ import annotations

import argparse
import os
import time
from random import SystemRandom

from kvmesh.common import metrics, telemetry
from kvmesh.common.bus import Bus
from kvmesh.common.config import Config, load_config
from kvmesh.common.discovery import make_discovery
from kvmesh.common.discovery.routers import RegisteredRouters, router_id
from kvmesh.common.grpc.client import Channels
from kvmesh.common.lifecycle import RoleServer, run
from kvmesh.common.tls import MeshTls
from kvmesh.core import PrefixIndex
from kvmesh.router.index import IndexFeed
from kvmesh.router.served import IndexServicer
from kvmesh.router.service import RouterService
from kvmesh.router.store_advice import StoreAdvice
from kvmesh.v1.events_pb2_grpc import add_EventServiceServicer_to_server
from kvmesh.v1.router_pb2 import RouterInfo

# A router that stops has nothing to wait for but calls under way; requests that wait are told to go
# elsewhere.
DRAIN_S = 5.0


async def serve(config: Config) -> None:
    """Run a router until the process is asked to stop."""
    server = RoleServer("router", config, config.router)
    bus = Bus.of(config, "kvmesh-router")
    discovery = make_discovery(config, bus)
    # Also where the addresses are configured here: others' configurations may leave them out.
    routers = RegisteredRouters(config, bus)
    channels = Channels(MeshTls.of(config.tls))
    index = PrefixIndex(config.router.index_max_bytes)
    kvbm = config.kvbm
    feed = IndexFeed(
        index,
        discovery,
        bus,
        channels,
        store_id=kvbm.id if kvbm.enabled else "",
        store_address=f"{kvbm.advertised_host()}:{kvbm.port}",
        store_node=config.node,
    )
    advice = StoreAdvice(feed, channels)
    service = RouterService(
        discovery,
        bus,
        feed,
        config.router,
        random=SystemRandom(),
        advice=advice,
    )
    _expose(index, feed)
    service.add_to(server)
    server.add_service("kvmesh.v1.EventService", add_EventServiceServicer_to_server, IndexServicer(feed))
    try:
        await server.start()
        await bus.start()
        await discovery.start()
        await feed.start()
        service.start()
        await service.replicas.start(f"{config.node}:{server.port}")
        await routers.register(
            RouterInfo(
                id=router_id(config.node, server.port),
                incarnation=time.time_ns(),
                address=server.address,
                node=config.node,
                pid=os.getpid(),
            )
        )
        # Without workers, too: saying that none is ready is an answer.
        server.set_ready(True)
        await server.wait_for_stop()
    finally:
        # Frontends ask others from now on.
        await routers.close()
        await server.stop(DRAIN_S)
        service.close()
        await advice.close()
        await feed.close()
        await discovery.close()
        await bus.close()
        await channels.close()


def _expose(index: PrefixIndex, feed: IndexFeed) -> None:
    exported = metrics.router()
    exported.index_blocks.set_function(lambda: index.stats()["held"])
    exported.index_bytes.set_function(lambda: index.stats()["bytes"])
    exported.index_forgotten.set_function(lambda: index.stats()["forgotten"])
    exported.index_holders.labels("live").set_function(feed.live_holders)
    exported.lag.set_function(feed.behind)


def main() -> None:
    parser = argparse.ArgumentParser(prog="kvmesh.router", description="kvmesh router")
    parser.add_argument("--config", help="configuration file")
    arguments = parser.parse_args()

    async def start() -> None:
        config = load_config(arguments.config)
        telemetry.setup("router", config)
        await serve(config)

    run(start)


if __name__ == "__main__":
    main()
