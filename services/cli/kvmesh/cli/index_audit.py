"""Compares what routers hold with what workers and stores hold: by digest, then block by block.

Events go on meanwhile, so both sides are brought to one batch of the holder's stream. A digest is had at any
batch that the holder still keeps; sets are taken as snapshots, and the older one follows the replayed batches
to where the newer one stands.

Whom to compare no router is asked alone: one that has never heard of a holder would be found right. Nor is
its part at some batch enough: one that hears nothing any more has what the holder had then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import grpc

from kvmesh.common.errors import KvmeshError
from kvmesh.common.events.columns import Kind, read, read_digest
from kvmesh.common.events.source import EventSource
from kvmesh.common.grpc.client import Channels
from kvmesh.v1.common_pb2 import Tier
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.events_pb2 import KvEventBatch, TierDigest
from kvmesh.v1.router_pb2 import GetStateRequest, GetStateResponse, IndexedHolder
from kvmesh.v1.router_pb2_grpc import RouterServiceStub

DEADLINE_S = 5.0
# How long a router may be behind before it counts as such.
PATIENCE_S = 5.0
AGAIN_S = 0.1

# Who holds blocks, whatever routers know of it: where each one's EventService is, by its id.
Registry = Callable[[], Awaitable[Mapping[str, str]]]
# The batch a holder was at when first asked, which a router must reach: by router, holder and incarnation.
Goals = dict[tuple[str, str, int], int]


class Result(StrEnum):
    EQUAL = "equal"
    DIFFERENT = "different"
    # Less than the holder has, some of whose blocks were forgotten at the index's memory cap.
    CAPPED = "capped"
    # Not complete, of another life of the holder, or not where that was at first, for all of the time given.
    BEHIND = "behind"
    # The holder is there, and the router has not heard of it in all of that time.
    ABSENT = "absent"
    # One of the two did not answer.
    UNREACHABLE = "unreachable"
    # Nobody knows where the holder is, so that nothing shows whether the router's part is true.
    UNKNOWN = "unknown"


@dataclass
class Comparison:
    """One router's part of one holder. Blocks are 16 hexadecimal digits, by tier."""

    router: str
    holder: str
    result: Result
    # What the router has.
    blocks: int = 0
    # The batch both were compared at.
    sequence: int = 0
    # The holder has them, the router not; and the other way round.
    missing: dict[str, list[str]] = field(default_factory=dict)
    extra: dict[str, list[str]] = field(default_factory=dict)
    error: str = ""

    @property
    def fine(self) -> bool:
        return self.result in (Result.EQUAL, Result.CAPPED)

    @property
    def settled(self) -> bool:
        """Whether another try would find the same."""
        return self.fine or self.result is Result.DIFFERENT

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Held:
    """A set of blocks a tier, as it was after one batch."""

    incarnation: int
    sequence: int
    tiers: dict[Tier, set[int]]

    @classmethod
    def of(cls, snapshot: Sequence[KvEventBatch]) -> Held:
        held = cls(snapshot[-1].incarnation, snapshot[-1].sequence, {})
        for batch in snapshot:
            held.apply(batch)
        return held

    def apply(self, batch: KvEventBatch) -> None:
        for kind, tier, hashes, _ in read(batch):
            blocks = self.tiers.setdefault(tier, set())
            if kind is Kind.REMOVED:
                blocks.difference_update(hashes.tolist())
            elif kind is Kind.CLEARED:
                for cleared in [blocks] if tier else self.tiers.values():
                    cleared.clear()
            else:
                blocks.update(hashes.tolist())
        self.sequence = batch.sequence

    def without(self, other: Held) -> dict[str, list[str]]:
        """What the other lacks."""
        left = {tier: blocks - other.tiers.get(tier, set()) for tier, blocks in self.tiers.items()}
        return {
            tier_name(tier): [f"{block:016x}" for block in sorted(blocks)]
            for tier, blocks in left.items()
            if blocks
        }


class Audit:
    """Asks routers and holders. Every call has a deadline; methods raise KvmeshError."""

    def __init__(self, channels: Channels, registered: Registry) -> None:
        self._channels = channels
        self._registered = registered

    async def state(self, router: str) -> GetStateResponse:
        """What a router says of itself."""
        stub = RouterServiceStub(self._channels.get(router))
        try:
            return await stub.GetState(GetStateRequest(), timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            raise KvmeshError.from_rpc(error, f"router {router}") from None

    async def held(self, address: str, holder_id: str) -> Held:
        """What a router or the holder itself has."""
        return Held.of(await EventSource(self._channels, address).snapshot(holder_id))

    async def verify(self, routers: Sequence[str], holder: str | None = None) -> list[Comparison]:
        """Compare each router's part of every holder that is registered or that any of them knows, or of one
        holder, with what that has.

        Who is there is read anew at each try: what has left meanwhile is not compared.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_S
        settled: dict[tuple[str, str], Comparison] = {}
        goals: Goals = {}
        while True:
            states = dict(zip(routers, await asyncio.gather(*map(self.state, routers)), strict=True))
            known = _known(states.values()) | dict(await self._registered())
            wanted = known if holder is None else {holder: known.get(holder, "")}
            found = await asyncio.gather(
                *(
                    self._compare(router, state, held, address, goals)
                    for router, state in states.items()
                    for held, address in wanted.items()
                    if (router, held) not in settled
                )
            )
            settled |= {(one.router, one.holder): one for one in found if one.settled}
            pending = [one for one in found if not one.settled]
            if not pending or loop.time() > deadline:
                return [*settled.values(), *pending]
            await asyncio.sleep(AGAIN_S)

    async def _compare(
        self, router: str, state: GetStateResponse, holder_id: str, address: str, goals: Goals
    ) -> Comparison:
        """`address` is where others know the holder to be; empty: nobody does."""
        held = next((held for held in state.holders if held.id == holder_id), None)
        try:
            if held is None:
                return await self._compare_absent(router, holder_id, address)
            held.address = held.address or address
            return await self._compare_present(router, held, goals)
        except KvmeshError as error:
            return Comparison(router, holder_id, Result.UNREACHABLE, error=error.message)

    async def _compare_absent(self, router: str, holder_id: str, address: str) -> Comparison:
        if not address:
            return Comparison(router, holder_id, Result.UNKNOWN)
        truth = await self.held(address, holder_id)
        nothing = Held(truth.incarnation, truth.sequence, {})
        return Comparison(
            router, holder_id, Result.ABSENT, sequence=truth.sequence, missing=truth.without(nothing)
        )

    async def _compare_present(self, router: str, held: IndexedHolder, goals: Goals) -> Comparison:
        found = Comparison(router, held.id, Result.EQUAL, _count(held.digests), held.sequence)
        if not held.address:
            # A store that is down is known to have nothing.
            found.result = Result.UNKNOWN if found.blocks else Result.EQUAL
            return found
        if not held.live:
            found.result = Result.BEHIND
            return found
        truth, latest = await self._published(held)
        if truth is None or not _same(truth, held.digests):
            found = await self._compare_blocks(found, held)
            latest = found.sequence
        goal = goals.setdefault((router, held.id, held.incarnation), latest)
        if found.fine and held.sequence < goal:
            found.result = Result.BEHIND
        return found

    async def _published(self, held: IndexedHolder) -> tuple[Sequence[TierDigest] | None, int]:
        """The holder's digests after the batch the router has reached, and the number of its last batch; None
        and 0 when it does not keep that any more."""
        source = EventSource(self._channels, held.address)
        try:
            batches = [batch async for batch in source.replay(held.id, held.incarnation, held.sequence)]
        except KvmeshError as error:
            if error.code != ErrorCode.ERROR_CODE_NOT_FOUND:
                raise
            batches = []
        return (batches[0].digests, batches[-1].sequence) if batches else (None, 0)

    async def _compare_blocks(self, found: Comparison, held: IndexedHolder) -> Comparison:
        ours, truth = await asyncio.gather(self.held(found.router, held.id), self.held(held.address, held.id))
        if ours.incarnation != truth.incarnation:
            found.result = Result.BEHIND
            return found
        try:
            await self._follow(held, *sorted((ours, truth), key=lambda side: side.sequence))
        except KvmeshError as error:
            if error.code != ErrorCode.ERROR_CODE_NOT_FOUND:
                raise
            # The holder keeps no batches that old; another try may find the two closer.
            found.result = Result.BEHIND
            return found
        found.sequence = truth.sequence
        found.missing, found.extra = truth.without(ours), ours.without(truth)
        if found.extra or (found.missing and not held.forgotten):
            found.result = Result.DIFFERENT
        elif found.missing:
            found.result = Result.CAPPED
        return found

    async def _follow(self, held: IndexedHolder, older: Held, newer: Held) -> None:
        """Bring the older set to where the newer one stands."""
        if older.sequence == newer.sequence:
            return
        source = EventSource(self._channels, held.address)
        batches = source.replay(held.id, held.incarnation, older.sequence + 1)
        async with aclosing(batches):
            async for batch in batches:
                older.apply(batch)
                if older.sequence == newer.sequence:
                    return


def tier_name(tier: Tier) -> str:
    return Tier.Name(tier).removeprefix("TIER_").lower()


def _known(states: Iterable[GetStateResponse]) -> dict[str, str]:
    """Every holder that some router knows, and where one of them says that it is; empty: none does."""
    known: dict[str, str] = {}
    for held in (held for state in states for held in state.holders):
        known[held.id] = held.address or known.get(held.id, "")
    return known


def _count(digests: Sequence[TierDigest]) -> int:
    return sum(digest.count for digest in digests)


def _same(one: Sequence[TierDigest], other: Sequence[TierDigest]) -> bool:
    """Whether the digests of all tiers agree; a tier that is not named is empty."""
    first, second = (
        {digest.tier: read_digest(digest) for digest in digests if digest.count} for digests in (one, other)
    )
    return first == second
