"""`python -m kvmesh.frontend [--config FILE]`: the OpenAI gateway and FrontendService."""

from __future__ import annotations

import argparse
import asyncio
import contextlib

import structlog

from kvmesh.common import lifecycle, telemetry
from kvmesh.common.bus import Bus
from kvmesh.common.config import Config, is_loopback, load_config
from kvmesh.common.discovery import make_discovery
from kvmesh.common.discovery.routers import make_router_directory
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.app import build_app
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.grpc.service import FrontendService
from kvmesh.frontend.http.server import HttpServer
from kvmesh.frontend.mesh.mesh import Mesh
from kvmesh.frontend.models import Models
from kvmesh.frontend.tenants.grpc_gate import GatedService
from kvmesh.frontend.tenants.tenants import Tenants
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.frontend_pb2_grpc import add_FrontendServiceServicer_to_server

log = structlog.get_logger()

# After the last live request has been told to end, until its connection is cut.
_LAST_WORDS_S = 2.0
# Waited for models, where other processes serve the port.
_MODELS_S = 30.0


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvmesh.frontend", description=__doc__)
    parser.add_argument("--config", help="configuration file")
    await serve(load_config(parser.parse_args().config))


async def serve(config: Config) -> None:
    """Run the frontend until it is asked to stop. Raises KvmeshError when a port is taken."""
    telemetry.setup("frontend", config)
    bus = Bus.of(config, "frontend")
    discovery = make_discovery(config, bus)
    routers = make_router_directory(config, bus)
    mesh = Mesh(config, discovery, routers)
    models = Models(discovery, config.frontend.aliases)
    tenants = Tenants(config.tenants, bus)
    if not tenants.required and not is_loopback(config.frontend.host):
        log.warning("no API keys are asked for; set `tenants.keys` to `required`", host=config.frontend.host)
    gateway = Gateway(config, models, mesh, tenants)
    server = lifecycle.RoleServer("frontend", config, config.frontend)
    service = GatedService(FrontendService(gateway), tenants, models)
    server.add_service("kvmesh.v1.FrontendService", add_FrontendServiceServicer_to_server, service)
    http = HttpServer(build_app(gateway), config.frontend)
    drain_s = 0.0
    try:
        await server.start()
        if config.frontend.processes == 1:
            await http.start()
        await tenants.start()
        await bus.start()
        # Routers first: who knows a worker should know whom to ask about it.
        await routers.start()
        await discovery.start()
        models.subscribe(lambda: server.set_ready(models.ready))
        models.start()
        if config.frontend.processes > 1:
            # The port is shared: until this process can answer, the others get its connections.
            await _await_models(models)
            await http.start()
        await server.wait_for_stop()
        drain_s = config.frontend.drain_s
    finally:
        await models.close()
        await _drain(gateway, http, server, drain_s)
        await gateway.close()
        await mesh.close()
        await tenants.close()
        await discovery.close()
        await routers.close()
        await bus.close()


async def _await_models(models: Models) -> None:
    """Until a model can be asked; not for ever, as a mesh without models says so best itself."""
    ready = asyncio.Event()
    if models.ready:
        return
    models.subscribe(lambda: ready.set() if models.ready else None)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_MODELS_S):
            await ready.wait()


async def _drain(gateway: Gateway, http: HttpServer, server: lifecycle.RoleServer, drain_s: float) -> None:
    """Accept nothing new; live requests have `drain_s` seconds to finish, then they end with an error."""
    error = KvmeshError(
        ErrorCode.ERROR_CODE_UNAVAILABLE, "the frontend is shutting down; send the request again"
    )
    timer = asyncio.get_running_loop().call_later(drain_s, gateway.mesh.abort_all, error)
    try:
        stop_s = drain_s + _LAST_WORDS_S
        await asyncio.gather(http.stop(stop_s), server.stop(stop_s))
        # Those that nobody waits for.
        await gateway.runs.ended()
    finally:
        timer.cancel()


if __name__ == "__main__":
    lifecycle.run(main)
