"""`python -m kvmesh.frontend [--config FILE]`: the OpenAI gateway and FrontendService."""

from __future__ import annotations

import argparse
import asyncio

from kvmesh.common import lifecycle, telemetry
from kvmesh.common.bus import Bus
from kvmesh.common.config import Config, load_config
from kvmesh.common.discovery import make_discovery
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.app import build_app
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.grpc_service import FrontendService
from kvmesh.frontend.http_server import HttpServer
from kvmesh.frontend.mesh import Mesh
from kvmesh.frontend.models import Models
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.frontend_pb2_grpc import add_FrontendServiceServicer_to_server

# After the last live request has been told to end, until its connection is cut.
_LAST_WORDS_S = 2.0


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvmesh.frontend", description=__doc__)
    parser.add_argument("--config", help="configuration file")
    await serve(load_config(parser.parse_args().config))


async def serve(config: Config) -> None:
    """Run the frontend until it is asked to stop. Raises KvmeshError when a port is taken."""
    telemetry.setup("frontend", config)
    bus = Bus(config.nats.effective_url(), "frontend")
    discovery = make_discovery(config, bus)
    mesh = Mesh(config, discovery)
    models = Models(discovery)
    gateway = Gateway(config, models, mesh)
    server = lifecycle.RoleServer("frontend", config, config.frontend)
    server.add_service(
        "kvmesh.v1.FrontendService", add_FrontendServiceServicer_to_server, FrontendService(gateway)
    )
    http = HttpServer(
        build_app(gateway), config.frontend.host, config.frontend.http_port, "frontend.http_port"
    )
    drain_s = 0.0
    try:
        await server.start()
        await http.start()
        await bus.start()
        await discovery.start()
        models.subscribe(lambda: server.set_ready(models.ready))
        models.start()
        await server.wait_for_stop()
        drain_s = config.frontend.drain_s
    finally:
        await models.close()
        await _drain(mesh, http, server, drain_s)
        await mesh.close()
        await discovery.close()
        await bus.close()


async def _drain(mesh: Mesh, http: HttpServer, server: lifecycle.RoleServer, drain_s: float) -> None:
    """Accept nothing new; live requests have `drain_s` seconds to finish, then they end with an error."""
    error = KvmeshError(
        ErrorCode.ERROR_CODE_UNAVAILABLE, "the frontend is shutting down; send the request again"
    )
    timer = asyncio.get_running_loop().call_later(drain_s, mesh.abort_all, error)
    try:
        await asyncio.gather(http.stop(drain_s + _LAST_WORDS_S), server.stop(drain_s + _LAST_WORDS_S))
    finally:
        timer.cancel()


if __name__ == "__main__":
    lifecycle.run(main)
