"""The mock engine's block pool: against a literal model, and against the hashes of SGLang."""

from __future__ import annotations

import hashlib
import random

from kvmesh.engine.contract import BlocksCleared, BlocksRemoved, BlocksStored
from kvmesh.engine.mock.blocks import Allocation, BlockPool, page_hashes


def chain(*names: int) -> list[int]:
    """A chain of blocks; names of the same start share the same blocks."""
    return [hash(names[: count + 1]) & 0xFFFFFFFF for count in range(len(names))]


def held(pool: BlockPool, blocks: list[int]) -> Allocation:
    allocation = pool.allocate(blocks, len(blocks), len(blocks))
    assert allocation is not None
    pool.store(allocation, blocks)
    return allocation


def test_page_hashes_are_sglangs() -> None:
    tokens = list(range(40))
    first = hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in tokens[:16])).digest()
    second = hashlib.sha256(first + b"".join(t.to_bytes(4, "little") for t in tokens[16:32])).digest()
    expected = [int.from_bytes(digest[:8], "big") for digest in (first, second)]
    assert page_hashes(tokens, 16, "") == expected
    assert not set(page_hashes(tokens, 16, "tenant")) & set(expected)


def test_released_blocks_stay_cached_and_are_found() -> None:
    pool = BlockPool(10)
    pool.release(held(pool, chain(1, 2, 3)))
    assert (pool.used, pool.idle, pool.available) == (0, 3, 10)
    again = pool.allocate(chain(1, 2, 4), 3, 3)
    assert again is not None
    assert again.cached == chain(1, 2)
    assert (pool.used, pool.idle) == (3, 1)


def test_the_least_recently_used_goes_first_and_tails_before_heads() -> None:
    pool = BlockPool(6)
    pool.release(held(pool, chain(1, 2, 3)))
    pool.release(held(pool, chain(4, 5)))
    pool.release(held(pool, chain(1, 2)))
    pool.take_events()
    assert pool.allocate([], 2, 2) is not None
    assert pool.take_events() == [BlocksRemoved([chain(1, 2, 3)[2]])]
    assert pool.allocate([], 1, 1) is not None
    assert pool.take_events() == [BlocksRemoved([chain(4, 5)[1]])]
    assert pool.match(chain(1, 2, 3)) == 2


def test_referenced_blocks_are_not_evicted() -> None:
    pool = BlockPool(4)
    allocation = held(pool, chain(1, 2, 3))
    assert pool.allocate([], 2, 2) is None
    assert not pool.extend(allocation, 2)
    assert pool.extend(allocation, 1)
    assert pool.take_events() == [BlocksStored(chain(1, 2, 3), None)]


def test_two_who_compute_the_same_share_one_copy() -> None:
    pool = BlockPool(8)
    one = pool.allocate(chain(1, 2), 2, 2)
    two = pool.allocate(chain(1, 2), 3, 3)
    assert one is not None
    assert two is not None
    assert pool.used == 5
    pool.store(one, chain(1, 2))
    pool.store(two, chain(1, 2, 3))
    assert pool.used == 3
    assert pool.take_events() == [
        BlocksStored(chain(1, 2), None),
        BlocksStored(chain(1, 2, 3)[2:], chain(1, 2)[1]),
    ]
    pool.release(one)
    assert pool.used == 3
    pool.release(two)
    assert (pool.used, pool.idle) == (0, 3)


def test_clear_keeps_what_is_referenced() -> None:
    pool = BlockPool(8)
    allocation = held(pool, chain(1, 2))
    pool.release(held(pool, chain(3)))
    pool.take_events()
    pool.clear()
    assert pool.take_events() == [BlocksRemoved(chain(3))]
    pool.release(allocation)
    pool.clear()
    assert pool.take_events() == [BlocksCleared()]
    pool.clear()
    assert pool.take_events() == []


def test_random_programs_keep_the_accounts_and_the_events_true() -> None:
    for seed in range(20):
        chance = random.Random(seed)
        pool = BlockPool(chance.randint(4, 40))
        live: list[tuple[Allocation, list[int]]] = []
        told: set[int] = set()
        for _ in range(400):
            if live and chance.random() < 0.45:
                allocation, blocks = live.pop(chance.randrange(len(live)))
                pool.store(allocation, blocks[: chance.randint(len(allocation.cached), len(blocks))])
                pool.release(allocation)
            else:
                blocks = chain(*(chance.randrange(3) for _ in range(chance.randint(1, 6))))
                allocation = pool.allocate(blocks, len(blocks), len(blocks))
                if allocation is not None:
                    live.append((allocation, blocks))
            for event in pool.take_events():
                match event:
                    case BlocksStored(hashes, parent):
                        assert parent is None or parent in told
                        assert not told & set(hashes)
                        told.update(hashes)
                    case BlocksRemoved(hashes):
                        assert told >= set(hashes)
                        told.difference_update(hashes)
                    case BlocksCleared():
                        told.clear()
            assert told == pool.cached_hashes()
            referenced = {block for allocation, _ in live for block in allocation.cached}
            own = sum(allocation.own for allocation, _ in live)
            assert pool.used == len(referenced) + own
            assert pool.idle == len(told) - len(referenced)
            assert 0 <= pool.used + pool.idle <= pool.total
