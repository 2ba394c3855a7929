"""Engines that name blocks in their own way: their events in the mesh's hashes, made from their tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from kvmesh.common.block_names import chain_seed
from kvmesh.common.errors import KvmeshError
from kvmesh.core import page_digests
from kvmesh.engine.contract import BlocksCleared, BlocksRemoved, BlocksStored, Engine, EngineInfo, KvEvent
from kvmesh.v1.errors_pb2 import ErrorCode

_DIGEST = 32


async def named_events(engine: Engine, info: EngineInfo) -> AsyncGenerator[list[KvEvent], None]:
    """The engine's events with the mesh's hashes. Raises KvmeshError as `Translation` does."""
    translation = Translation(info.page_size) if info.own_hashes else None
    async with aclosing(engine.kv_events()) as batches:
        async for events in batches:
            yield translation.translate(events) if translation else events


class Translation:
    """Remembers the digest behind each of the engine's names, because a chain goes on from it.

    About 200 bytes a block, for engines that need it only.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._digests: dict[int, bytes] = {}

    def translate(self, events: Sequence[KvEvent]) -> list[KvEvent]:
        """The same events in the mesh's hashes; blocks that cannot be named are left out.

        Raises KvmeshError(ENGINE_FAILED) for events whose tokens do not fit their blocks.
        """
        translated: list[KvEvent] = []
        for event in events:
            match event:
                case BlocksStored():
                    before = self._before(event)
                    if before is not None:
                        translated.append(self._stored(event, before))
                case BlocksRemoved(names):
                    gone = [self._digests.pop(name) for name in names if name in self._digests]
                    translated.append(BlocksRemoved([_hash(digest) for digest in gone]))
                case BlocksCleared():
                    self._digests.clear()
                    translated.append(event)
        return translated

    def _before(self, event: BlocksStored) -> bytes | None:
        """What the chain goes on from; None where nobody can tell."""
        if event.parent is not None:
            return self._digests.get(event.parent)
        # Without its salt a tenant's block would go by the name of what anybody may read.
        return None if event.block_salt is None else chain_seed(event.block_salt)

    def _stored(self, event: BlocksStored, before: bytes) -> BlocksStored:
        names, tokens = event.hashes, event.token_ids
        if len(tokens) != len(names) * self._page_size:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_ENGINE_FAILED,
                f"the engine told of {len(names)} blocks with {len(tokens)} tokens, where a block has "
                f"{self._page_size}; set `engine.page_size` to what the engine uses",
            )
        chain = page_digests(list(tokens), self._page_size, before)
        digests = [chain[at : at + _DIGEST] for at in range(0, len(chain), _DIGEST)]
        self._digests.update(zip(names, digests, strict=True))
        parent = None if event.parent is None else _hash(before)
        return BlocksStored([_hash(digest) for digest in digests], parent)


def _hash(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")
