"""`python -m kvmesh.prefill [--config FILE]`."""

from kvmesh.engine.contract import Role
from kvmesh.engine.worker.main import main
from kvmesh.prefill.service import add_service

# Engines start processes that import this module again.
if __name__ == "__main__":
    main((Role.PREFILL,), add_service)
