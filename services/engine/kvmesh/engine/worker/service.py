"""The RPCs every worker serves, whatever its role: WorkerService, the other role's refusal."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from kvmesh.common.errors import KvmeshError
from kvmesh.engine.contract import Role
from kvmesh.engine.worker.registration import Registration
from kvmesh.v1.engine_pb2 import (
    FlushCacheRequest,
    FlushCacheResponse,
    GetWorkerRequest,
    GetWorkerResponse,
)
from kvmesh.v1.engine_pb2_grpc import (
    DecodeServiceServicer,
    PrefillServiceServicer,
    WorkerServiceServicer,
    add_DecodeServiceServicer_to_server,
    add_PrefillServiceServicer_to_server,
)
from kvmesh.v1.errors_pb2 import ErrorCode


class WorkerServicer(WorkerServiceServicer):
    def __init__(self, registration: Registration, flush: Callable[[], Awaitable[None]]) -> None:
        self._registration = registration
        self._flush = flush

    async def GetWorker(self, request: GetWorkerRequest, context: Any) -> GetWorkerResponse:
        return GetWorkerResponse(worker=self._registration.info())

    async def FlushCache(self, request: FlushCacheRequest, context: Any) -> FlushCacheResponse:
        await self._flush()
        return FlushCacheResponse()


class _NotDecode(DecodeServiceServicer):
    async def Generate(self, request_iterator: Any, context: Any) -> None:
        raise _wrong_role("prefill", "Generate")


class _NotPrefill(PrefillServiceServicer):
    def __init__(self, role: Role) -> None:
        self._role = role

    async def Prefill(self, request_iterator: Any, context: Any) -> None:
        raise _wrong_role(self._role, "Prefill")


def refuse_other_role(role: Role, server: Any) -> None:
    """Answer calls meant for another role with WRONG_ROLE: the caller's view of this worker is old."""
    if role is Role.PREFILL:
        add_DecodeServiceServicer_to_server(_NotDecode(), server)
    else:
        add_PrefillServiceServicer_to_server(_NotPrefill(role), server)


def _wrong_role(role: str, method: str) -> KvmeshError:
    return KvmeshError(
        ErrorCode.ERROR_CODE_WRONG_ROLE,
        f"this worker is {role} now and does not serve {method}; route the request again",
    )
