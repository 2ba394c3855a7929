"""`python -m kvmesh.decode [--config FILE] [--role decode|aggregated]`."""

from kvmesh.decode.service import add_service
from kvmesh.engine.contract import Role
from kvmesh.engine.worker.main import main

# Engines start processes that import this module again.
if __name__ == "__main__":
    main((Role.DECODE, Role.AGGREGATED), add_service)
