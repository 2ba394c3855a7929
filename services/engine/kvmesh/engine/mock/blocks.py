"""The device pool of the mock engine: pages, and the prefix cache that the page hashes make of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvmesh.common.block_names import chain_seed
from kvmesh.core import hash_tokens
from kvmesh.engine.contract import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent


def page_hashes(token_ids: Sequence[int], page_size: int, cache_salt: str) -> list[int]:
    """The 64-bit hashes of the whole pages of `token_ids`, as SGLang's storage keys begin."""
    return hash_tokens(np.asarray(token_ids, dtype=np.uint32), page_size, chain_seed(cache_salt)).tolist()


class Allocation:
    """The blocks one request holds: a referenced chain of cached ones, then ones of its own."""

    __slots__ = ("cached", "own")

    def __init__(self, cached: list[int], own: int) -> None:
        self.cached = cached
        self.own = own

    def __len__(self) -> int:
        return len(self.cached) + self.own


class BlockPool:
    """Counts blocks and remembers which prefixes they hold.

    A cached block is named by its hash, which stands for the whole prefix up to it. Requests reference a
    chain from its root on, and give it back tail first; so the least recently used unreferenced block never
    has a child left, and evicting it breaks no chain.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        # Changes of the cached set since the last `take_events`, in order.
        self._events: list[KvEvent] = []
        self._references: dict[int, int] = {}
        # Unreferenced cached blocks, least recently used first; a dict for its order.
        self._idle: dict[int, None] = {}
        self._own = 0

    @property
    def used(self) -> int:
        """Blocks that live requests reference."""
        return len(self._references) - len(self._idle) + self._own

    @property
    def idle(self) -> int:
        """Cached blocks that nobody references."""
        return len(self._idle)

    @property
    def available(self) -> int:
        """Blocks that are free or can be evicted."""
        return self.total - self.used

    def cached_hashes(self) -> set[int]:
        return set(self._references)

    def match(self, hashes: Sequence[int]) -> int:
        """How many leading blocks of the chain are cached."""
        for count, block in enumerate(hashes):
            if block not in self._references:
                return count
        return len(hashes)

    def allocate(self, chain: Sequence[int], blocks: int, room: int) -> Allocation | None:
        """`blocks` blocks, of which as many as possible are cached ones of `chain`.

        None, and nothing changed, unless `room` blocks would fit.
        """
        shared = list(chain[: self.match(chain)])
        revived = sum(1 for block in shared if block in self._idle)
        own = blocks - len(shared)
        if own + (room - blocks) + revived > self.available:
            return None
        for block in shared:
            self._acquire(block)
        allocation = Allocation(shared, 0)
        self.extend(allocation, own)
        return allocation

    def extend(self, allocation: Allocation, blocks: int) -> bool:
        """Add `blocks` of its own, evicting as needed; False, and nothing changed, when they do not fit."""
        if blocks > self.available:
            return False
        short = blocks - (self.total - len(self._references) - self._own)
        if short > 0:
            self._evict(short)
        allocation.own += blocks
        self._own += blocks
        return True

    def store(self, allocation: Allocation, chain: Sequence[int]) -> None:
        """Cache the leading blocks of the allocation under their hashes; `chain` starts at the root.

        A block another request has cached meanwhile is shared, and the copy freed.
        """
        known = len(allocation.cached)
        added: list[int] = []
        for block in chain[known:]:
            if block in self._references:
                self._acquire(block)
            else:
                self._references[block] = 1
                added.append(block)
        count = len(chain) - known
        if count <= 0:
            return
        allocation.own -= count
        self._own -= count
        allocation.cached.extend(chain[known:])
        if added:
            # What was cached already is a prefix of the chain, so the added blocks are contiguous.
            first = len(chain) - len(added)
            self._events.append(BlocksStored(added, chain[first - 1] if first else None))

    def release(self, allocation: Allocation) -> None:
        """Give everything back; cached blocks stay until they are evicted. The allocation is empty after."""
        for block in reversed(allocation.cached):
            self._references[block] -= 1
            if not self._references[block]:
                self._idle[block] = None
        self._own -= allocation.own
        allocation.cached = []
        allocation.own = 0

    def clear(self) -> None:
        """Forget every unreferenced block."""
        if not self._idle:
            return
        for block in self._idle:
            del self._references[block]
        if self._references:
            self._events.append(BlocksRemoved(list(self._idle)))
        else:
            self._events.append(BlocksCleared())
        self._idle.clear()

    def take_events(self) -> list[KvEvent]:
        events, self._events = self._events, []
        return events

    def _acquire(self, block: int) -> None:
        self._references[block] += 1
        self._idle.pop(block, None)

    def _evict(self, count: int) -> None:
        evicted = [block for block, _ in zip(self._idle, range(count), strict=False)]
        for block in evicted:
            del self._idle[block]
            del self._references[block]
        self._events.append(BlocksRemoved(evicted))
