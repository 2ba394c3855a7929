"""Where requests run while no router answers: the ready workers in turn."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection

from kvmesh.common.capabilities import Names, missing, offered, offered_together
from kvmesh.common.discovery.contract import Discovery
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.common_pb2 import (
    ROLE_AGGREGATED,
    ROLE_DECODE,
    ROLE_PREFILL,
    WORKER_STATE_READY,
    WorkerInfo,
)
from kvmesh.v1.engine_pb2 import Bootstrap
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import Placement, WorkerRef

POLICY = "fallback"


class FallbackPlacement:
    """Round robin over what discovery knows; no leases, no index."""

    def __init__(self, discovery: Discovery, rng: random.Random | None = None) -> None:
        self._discovery = discovery
        self._turn = itertools.count()
        self._rng = rng or random.SystemRandom()

    def place(self, model: str, needs: Names, excluded: Collection[str]) -> Placement:
        """Raises KvmeshError: NO_WORKER_READY when no set of ready workers is left, UNSUPPORTED when all that
        there are cannot do it."""
        ready: dict[int, list[WorkerInfo]] = {}
        of_model = [worker for worker in self._discovery.workers().values() if worker.model.name == model]
        for worker in sorted(of_model, key=lambda w: w.id):
            if (
                worker.state == WORKER_STATE_READY
                and worker.id not in excluded
                and needs <= offered(worker.model)
            ):
                ready.setdefault(worker.role, []).append(worker)
        prefills = ready.get(ROLE_PREFILL, [])
        streaming = ready.get(ROLE_AGGREGATED, []) + (ready.get(ROLE_DECODE, []) if prefills else [])
        if not streaming:
            raise missing(model, needs, offered_together(of_model)) or KvmeshError(
                ErrorCode.ERROR_CODE_NO_WORKER_READY,
                f"no worker is ready for model {model!r}; try again soon",
                retry_after_ms=1_000,
            )
        turn = next(self._turn)
        chosen = streaming[turn % len(streaming)]
        if chosen.role == ROLE_AGGREGATED:
            return Placement(decode=_ref(chosen))
        # One step on each time round the streaming workers, so that every pair gets its turn.
        prefill = prefills[(turn + turn // len(streaming)) % len(prefills)]
        return Placement(
            prefill=_ref(prefill),
            decode=_ref(chosen),
            bootstrap=Bootstrap(
                host=prefill.bootstrap.host,
                port=prefill.bootstrap.port,
                room=self._rng.getrandbits(63),
            ),
        )


def _ref(worker: WorkerInfo) -> WorkerRef:
    return WorkerRef(id=worker.id, incarnation=worker.incarnation, address=worker.address)
