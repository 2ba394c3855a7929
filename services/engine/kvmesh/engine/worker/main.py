"""The command line of a worker's process."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kvmesh.common import lifecycle, telemetry
from kvmesh.common.config import load_config
from kvmesh.engine.contract import Role
from kvmesh.engine.worker.process import AddService, WorkerProcess


def main(roles: Sequence[Role], add_service: AddService, arguments: Sequence[str] | None = None) -> None:
    """Run a worker in the first of `roles`, or in the one `--role` names if there are several."""
    parser = argparse.ArgumentParser(
        prog=f"python -m kvmesh.{roles[0]}", description=f"kvmesh {roles[0]} worker"
    )
    parser.add_argument("--config", metavar="FILE", help="YAML configuration of the mesh")
    if len(roles) > 1:
        parser.add_argument("--role", choices=[role.value for role in roles], default=roles[0].value)
    options = parser.parse_args(arguments)
    role = Role(getattr(options, "role", roles[0]))

    async def serve() -> None:
        config = load_config(options.config).of_worker()
        telemetry.setup(role.value, config)
        await WorkerProcess(config, role, add_service).run()

    lifecycle.run(serve)
