"""What kvbm answers over gRPC. Block bytes never come this way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.events.columns import STORE_TIERS
from kvmesh.core import StoreServer
from kvmesh.kvbm.fetching import Fetching, hashes_of
from kvmesh.kvbm.lending import Lending
from kvmesh.kvbm.warming import STEP_BLOCKS, Warmer
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.kvbm_pb2 import (
    BlockTiers,
    CorruptBlock,
    EvictRequest,
    EvictResponse,
    FetchRequest,
    FetchResponse,
    FlushRequest,
    FlushResponse,
    GetStatsRequest,
    GetStatsResponse,
    HintRequest,
    HintResponse,
    HottestRequest,
    HottestResponse,
    LocatedBlocks,
    LocateRequest,
    LocateResponse,
    NetworkStats,
    NvmeStats,
    ObjectStats,
    PersistRequest,
    PersistResponse,
    PinRequest,
    PinResponse,
    PrefetchRequest,
    PrefetchResponse,
    ReleaseRequest,
    ReleaseResponse,
    ReturnRequest,
    ReturnResponse,
    TierStats,
    VerifyRequest,
    VerifyResponse,
    WarmRequest,
    WarmResponse,
)
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceServicer

_TIERS = {name: tier for tier, name in STORE_TIERS.items()}
DIGEST_BYTES = 32
MAX_PIN_MS = 86_400_000
MAX_PREFETCH_MS = 3_600_000


class KvbmServicer(KvbmServiceServicer):
    def __init__(
        self,
        store: StoreServer,
        store_id: str,
        node: str,
        eviction: str,
        lending: Lending,
        fetching: Fetching,
        warmer: Warmer,
    ) -> None:
        self._store = store
        self._warmer = warmer
        self._lending = lending
        self._fetching = fetching
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
            objects=self._objects(),
            pins=pins,
            pinned_bytes=pinned_bytes,
            network=NetworkStats(
                fetched_total=self._fetching.fetched,
                fetched_bytes_total=self._fetching.fetched_bytes,
                failed=self._fetching.failed,
                lent_total=self._lending.total,
                lent=self._lending.blocks,
                bytes_per_s={source: round(speed) for source, speed in self._fetching.bytes_per_s.items()},
            ),
        )

    async def Flush(self, request: FlushRequest, context: Any) -> FlushResponse:
        name = None if request.tier == Tier.TIER_UNSPECIFIED else self._named(request.tier)
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
        if bool(request.digests) == bool(request.hashes):
            raise invalid("name the blocks by `digests` or by `hashes`, not both", param="hashes")
        hashes = list(request.hashes) or hashes_of(_chain(request.digests))
        await asyncio.to_thread(self._store.hint, request.model, hashes, hints)
        return HintResponse()

    async def Prefetch(self, request: PrefetchRequest, context: Any) -> PrefetchResponse:
        if request.tier not in (Tier.TIER_UNSPECIFIED, Tier.TIER_HOST):
            raise invalid("blocks are prefetched to TIER_HOST, where engines read them", param="tier")
        if not 1 <= request.within_ms <= MAX_PREFETCH_MS:
            raise invalid(
                f"a prefetch is wanted within 1 to {MAX_PREFETCH_MS} ms, not {request.within_ms}",
                param="within_ms",
            )
        if bool(request.digests) == bool(request.hashes):
            raise invalid("name the chain by `digests` or by `hashes`, not both", param="hashes")
        digests = _chain(request.digests) if request.digests else b""
        hashes, within_s = list(request.hashes), request.within_ms / 1e3
        here, coming = await asyncio.to_thread(self._store.prefetch, request.model, digests, hashes, within_s)
        if request.source:
            self._fetching.want(request.source, request.model, hashes or hashes_of(digests), within_s)
        elif "network" in self._store.tiers:
            named = hashes or hashes_of(digests)
            await asyncio.to_thread(self._store.recall, request.model, named, within_s)
        return PrefetchResponse(here=here, coming=coming)

    async def Fetch(self, request: FetchRequest, context: Any) -> FetchResponse:
        return await self._lending.fetch(request)

    async def Return(self, request: ReturnRequest, context: Any) -> ReturnResponse:
        return await self._lending.take_back(request)

    async def Evict(self, request: EvictRequest, context: Any) -> EvictResponse:
        name, digests = self._named(request.tier), _chain(request.digests)
        return EvictResponse(blocks=await asyncio.to_thread(self._store.evict, name, request.model, digests))

    async def Locate(self, request: LocateRequest, context: Any) -> LocateResponse:
        located = await asyncio.to_thread(self._store.locate, request.model, _chain(request.digests))
        return LocateResponse(
            namespaces=[
                LocatedBlocks(
                    model=model,
                    revision=revision,
                    dtype=dtype,
                    layout=layout,
                    rank=rank,
                    ranks=ranks,
                    blocks=[BlockTiers(tiers=[_TIERS[tier] for tier in tiers]) for tiers in blocks],
                )
                for (model, revision, dtype, layout), (rank, ranks), blocks in located
            ]
        )

    async def Verify(self, request: VerifyRequest, context: Any) -> AsyncIterator[VerifyResponse]:
        everything = request.tier == Tier.TIER_UNSPECIFIED
        # All of object storage is read only when it is named: every block of it costs a request.
        own = [name for name in self._store.tiers if name != "network"]
        for name in own if everything else [self._named(request.tier)]:
            after: int | None = None
            while True:
                try:
                    blocks, size, bad, after = await asyncio.to_thread(
                        self._store.check, name, after, STEP_BLOCKS
                    )
                except OSError as error:
                    yield VerifyResponse(tier=_TIERS[name], problem=str(error))
                    break
                yield VerifyResponse(
                    tier=_TIERS[name],
                    blocks=blocks,
                    bytes=size,
                    corrupt=[
                        CorruptBlock(tier=_TIERS[tier], digest=bytes.fromhex(digest)) for tier, digest in bad
                    ],
                    complete=after is None,
                )
                if after is None:
                    break
                if request.bytes_per_s:
                    await asyncio.sleep(size / request.bytes_per_s)

    async def Warm(self, request: WarmRequest, context: Any) -> AsyncIterator[WarmResponse]:
        unknown = request.model and not await asyncio.to_thread(self._store.locate, request.model, b"")
        if unknown and not request.source:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_NOT_FOUND,
                f"{self._id} knows no model `{request.model}`; all with an empty name",
                param="model",
            )
        async for step in self._warmer.warm(request.model, request.source):
            yield step

    async def Hottest(self, request: HottestRequest, context: Any) -> AsyncIterator[HottestResponse]:
        async for run in self._warmer.hottest(request.model, request.most_blocks):
            yield run

    async def Persist(self, request: PersistRequest, context: Any) -> PersistResponse:
        if self._store.tiers == ["host"]:
            raise invalid(
                f"{self._id} has no nvme tier and no object storage; set kvbm.nvme.path or kvbm.object.url"
            )
        try:
            await asyncio.to_thread(self._store.persist)
        except (OSError, ValueError) as error:
            raise KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, str(error)) from None
        return PersistResponse()

    def _named(self, tier: Tier) -> str:
        """A tier of this store. Raises KvmeshError(INVALID_ARGUMENT)."""
        name = STORE_TIERS.get(tier, "")
        if name not in self._store.tiers:
            raise invalid(
                f"{self._id} has no tier {tier}; it has: {', '.join(self._store.tiers)}", param="tier"
            )
        return name

    def _tier(self, name: str) -> TierStats:
        stats = self._store.stats(name)
        scrubbed = self._store.scrubbed().get(name)
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
            hinted_total=stats["hinted"],
            corrupt_total=stats["corrupt"],
            evicted=evicted,
            scrubbed_total=scrubbed["blocks"] if scrubbed else 0,
            scrub_passes_total=scrubbed["passes"] if scrubbed else 0,
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
            late_total=flow["late"],
        )

    def _objects(self) -> ObjectStats | None:
        flow = self._store.objects()
        if flow is None:
            return None
        return ObjectStats(
            url=flow["url"],
            problem=flow["problem"] or "",
            outages_total=flow["outages"],
            recovered=flow["recovered"],
            written_total=flow["written"],
            written_bytes_total=flow["written_bytes"],
            waiting=flow["waiting"],
            skipped=flow["skipped"],
            recalled_total=flow["recalled"],
            read_bytes_total=flow["read_bytes"],
            missed=flow["missed"],
            bytes_per_s=flow["bytes_per_s"],
        )


def _chain(digests: Sequence[bytes]) -> bytes:
    if not digests or any(len(digest) != DIGEST_BYTES for digest in digests):
        raise invalid(f"`digests` must be one or more of {DIGEST_BYTES} bytes each", param="digests")
    return b"".join(digests)
