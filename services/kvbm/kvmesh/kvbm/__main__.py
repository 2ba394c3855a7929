"""`python -m kvmesh.kvbm [--config FILE]`: the kvbm process."""

from __future__ import annotations

import argparse
import logging
import os
import sys

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
    if "nixl" in sys.modules:
        # Where a machine has RDMA's libraries of its own, those of NIXL crash as they are unloaded.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
