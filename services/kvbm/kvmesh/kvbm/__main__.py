"""`python -m kvmesh.kvbm [--config FILE]`: the kvbm process."""

from __future__ import annotations

import argparse

from kvmesh.common import telemetry
from kvmesh.common.config import load_config
from kvmesh.common.lifecycle import run
from kvmesh.kvbm.process import serve


def main() -> None:
    parser = argparse.ArgumentParser(prog="kvmesh.kvbm", description="kvmesh KV block manager")
    parser.add_argument("--config", help="configuration file")
    arguments = parser.parse_args()

    async def start() -> None:
        config = load_config(arguments.config)
        telemetry.setup("kvbm", config)
        await serve(config)

    run(start)


if __name__ == "__main__":
    main()
