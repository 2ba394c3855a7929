"""Where the routers are that a command asks."""

from __future__ import annotations

import asyncio

import nats
import nats.errors
import nats.js.errors

from kvmesh.common.buckets import read_all
from kvmesh.common.bus import bus_security
from kvmesh.common.config import Config
from kvmesh.common.discovery.routers import read_router
from kvmesh.common.tls import MeshTls

# Only a NATS that hangs takes it: one that is down refuses at once.
_DEADLINE_S = 5.0


async def router_addresses(config: Config) -> list[str]:
    """As configured; else of all routers that have registered; else, where none has or NATS is away, this
    configuration's own. Takes five seconds at most."""
    if config.router.addresses() or config.discovery.kind != "nats":
        return config.router.effective_addresses()
    return await _registered(config) or config.router.effective_addresses()


async def _registered(config: Config) -> list[str]:
    async def ignore(_: Exception) -> None: ...

    client = None
    try:
        async with asyncio.timeout(_DEADLINE_S):
            client = await nats.connect(
                config.nats.effective_url(),
                allow_reconnect=False,
                connect_timeout=int(_DEADLINE_S),
                error_cb=ignore,
                **bus_security(MeshTls.of(config.bus_tls())),
            )
            bucket = await client.jetstream().key_value(config.discovery.routers_bucket)
            known = sorted((await read_all(bucket)).items())
    except (OSError, TimeoutError, nats.errors.Error, nats.js.errors.Error):
        return []
    finally:
        if client is not None:
            await client.close()
    infos = (read_router(router_id, value) for router_id, value in known)
    return list(dict.fromkeys(info.address for info in infos if info is not None))
