"""What kvbm answers over gRPC. Block bytes never come this way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.events.columns import STORE_TIERS
from kvmesh.core import StoreServer
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.kvbm_pb2 import (
    FlushRequest,
    FlushResponse,
    GetStatsRequest,
    GetStatsResponse,
    HintRequest,
    HintResponse,
    NvmeStats,
    PinRequest,
    PinResponse,
    ReleaseRequest,
    ReleaseResponse,
    TierStats,
)
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceServicer

_TIERS = {name: tier for tier, name in STORE_TIERS.items()}
DIGEST_BYTES = 32
MAX_PIN_MS = 86_400_000


class KvbmServicer(KvbmServiceServicer):
    def __init__(self, store: StoreServer, store_id: str, node: str, eviction: str) -> None:
        self._store = store
        self._id = store_id
        self._node = node
        self._eviction = eviction

    async def GetStats(self, request: GetStatsRequest, context: Any) -> GetStatsResponse:
        pins, pinned_bytes = self._store.pinned
        return GetStatsResponse(
            id=self._id,
            node=self._node,
            tiers=[self._tier(tier) for tier in self._store.tiers],
            engines=self._store.engines,
            eviction=self._eviction,
            nvme=self._nvme(),
            pins=pins,
            pinned_bytes=pinned_bytes,
        )

    async def Flush(self, request: FlushRequest, context: Any) -> FlushResponse:
        name = None if request.tier == Tier.TIER_UNSPECIFIED else STORE_TIERS.get(request.tier, "")
        if name is not None and name not in self._store.tiers:
            raise invalid(
                f"{self._id} has no tier {request.tier}; it has: {', '.join(self._store.tiers)}; all with "
                "TIER_UNSPECIFIED",
                param="tier",
            )
        return FlushResponse(blocks=await asyncio.to_thread(self._store.flush, name))

    async def Pin(self, request: PinRequest, context: Any) -> PinResponse:
        if not 1 <= request.ttl_ms <= MAX_PIN_MS:
            raise invalid(f"a pin lasts 1 to {MAX_PIN_MS} ms, not {request.ttl_ms}", param="ttl_ms")
        digests = _chain(request.digests)
        try:
            receipt, blocks, pinned = await asyncio.to_thread(
                self._store.pin, request.tenant, request.model, digests, request.ttl_ms / 1e3
            )
        except LookupError as error:
            raise KvmeshError(ErrorCode.ERROR_CODE_NOT_FOUND, str(error), param="digests") from None
        except ValueError as error:
            raise KvmeshError(ErrorCode.ERROR_CODE_RATE_LIMITED, str(error), param="tenant") from None
        return PinResponse(receipt=receipt, blocks=blocks, bytes=pinned)

    async def Release(self, request: ReleaseRequest, context: Any) -> ReleaseResponse:
        return ReleaseResponse(released=await asyncio.to_thread(self._store.unpin, request.receipt))

    async def Hint(self, request: HintRequest, context: Any) -> HintResponse:
        hints = (
            request.session if request.HasField("session") else None,
            request.returns if request.HasField("returns") else None,
            request.tool_call,
            request.returns_in_s if request.HasField("returns_in_s") else None,
        )
        await asyncio.to_thread(self._store.hint, request.model, _chain(request.digests), hints)
        return HintResponse()

    def _tier(self, name: str) -> TierStats:
        stats = self._store.stats(name)
        evicted = stats["evicted"]
        return TierStats(
            tier=_TIERS[name],
            capacity_bytes=stats["capacity_bytes"],
            used_bytes=stats["used_bytes"],
            blocks=stats["blocks"],
            blocks_in_use=stats["blocks_in_use"],
            stored_total=stats["stored"],
            loaded_total=stats["loaded"],
            evicted_total=evicted["room"] + evicted["layout"],
            lookups_total=stats["lookups"],
            hits_total=stats["hits"],
            corrupt_total=stats["corrupt"],
            evicted=evicted,
        )

    def _nvme(self) -> NvmeStats | None:
        flow = self._store.flow()
        if flow is None:
            return None
        return NvmeStats(
            problem=flow["problem"] or "",
            io=flow["io"],
            outages_total=flow["outages"],
            recovered=flow["recovered"],
            spilled_total=flow["spilled"],
            shed_total=flow["shed"],
            unlikely_total=flow["unlikely"],
            over_budget_total=flow["over_budget"],
            unplaced_total=flow["unplaced"],
            promoted_total=flow["promoted"],
            failed_total=flow["failed"],
            coming=flow["coming"],
            written_bytes_total=flow["written_bytes"],
            read_bytes_total=flow["read_bytes"],
        )


def _chain(digests: Sequence[bytes]) -> bytes:
    if not digests or any(len(digest) != DIGEST_BYTES for digest in digests):
        raise invalid(f"`digests` must be one or more of {DIGEST_BYTES} bytes each", param="digests")
    return b"".join(digests)
