"""What callers are told of the selector's decisions: placements and refusals as messages."""

from __future__ import annotations

from random import Random

from kvmesh.common.errors import KvmeshError
from kvmesh.core import Refused
from kvmesh.router.placement import RETRY_AFTER_MS
from kvmesh.v1.common_pb2 import WorkerInfo
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import Placement, WorkerRef


def write_placement(into: Placement, prefill: WorkerInfo, decode: WorkerInfo, random: Random) -> None:
    """One worker for both, or a pair with a meeting point of its own."""
    _write_ref(into.decode, decode)
    if prefill is not decode:
        _write_ref(into.prefill, prefill)
        into.bootstrap.host, into.bootstrap.port = prefill.bootstrap.host, prefill.bootstrap.port
        into.bootstrap.room = random.getrandbits(63)


def refusal(refused: Refused) -> KvmeshError:
    """Why, and when to come back."""
    if refused.reason == "no-worker":
        return KvmeshError(
            ErrorCode.ERROR_CODE_NO_WORKER_READY,
            "the workers this request could go to have left; retry shortly",
            retry_after_ms=RETRY_AFTER_MS,
        )
    why = {
        "full": "too many requests wait",
        "waited": "no worker had room in time",
        "deadline": "no worker could answer before the request's deadline",
    }[refused.reason]
    return KvmeshError(
        ErrorCode.ERROR_CODE_RATE_LIMITED,
        f"{why}; retry after the time given",
        retry_after_ms=max(round(refused.retry_after_ms), 1),
    )


def _write_ref(into: WorkerRef, info: WorkerInfo) -> None:
    into.id, into.incarnation, into.address = info.id, info.incarnation, info.address
