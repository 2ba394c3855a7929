"""Batching, growth and retraction, without a clock."""

from __future__ import annotations

from kvmesh.engine.contract import EngineRequest, Sampling
from kvmesh.engine.mock.blocks import BlockPool
from kvmesh.engine.mock.live import LiveRequest
from kvmesh.engine.mock.scheduler import MAX_PREFILL_TOKENS, Decode, Prefill, Scheduler
from kvmesh.engine.mock.tokens import TokenSource, Vocabulary

PAGE = 4
WORDS = Vocabulary(range(10, 90), (2,))


def live(handle: int, length: int, priority: int = 0) -> LiveRequest:
    request = EngineRequest("r", [100 * handle + n for n in range(length)], Sampling(), priority=priority)
    source = TokenSource(WORDS, request.token_ids, request.sampling)
    return LiveRequest(handle, request, lambda outputs: None, source, 1_000, 0.0)


def prefill(scheduler: Scheduler) -> list[int]:
    """Run a prefill step; the handles it took."""
    step = scheduler.next_step()
    assert isinstance(step, Prefill)
    for each in step.batch:
        scheduler.computed(each)
        scheduler.run(each)
        each.output.append(each.source.next())
    return [each.handle for each in step.batch]


def decode(scheduler: Scheduler) -> list[int]:
    step = scheduler.next_step()
    assert isinstance(step, Decode)
    for each in step.batch:
        scheduler.advance(each)
        each.output.append(each.source.next())
    return [each.handle for each in step.batch]


def test_prefill_goes_before_decode() -> None:
    scheduler = Scheduler(BlockPool(100), PAGE, 8)
    scheduler.enqueue(live(1, 10))
    assert prefill(scheduler) == [1]
    scheduler.enqueue(live(2, 10))
    scheduler.enqueue(live(3, 10))
    assert prefill(scheduler) == [2, 3]
    assert decode(scheduler) == [1, 2, 3]


def test_the_urgent_go_first() -> None:
    scheduler = Scheduler(BlockPool(100), PAGE, 8)
    for each in (live(1, 5), live(2, 5, priority=3), live(3, 5), live(4, 5, priority=3)):
        scheduler.enqueue(each)
    assert prefill(scheduler) == [2, 4, 1, 3]


def test_batch_and_prefill_limits() -> None:
    scheduler = Scheduler(BlockPool(100_000), PAGE, 3)
    for handle in range(1, 6):
        scheduler.enqueue(live(handle, 10))
    assert prefill(scheduler) == [1, 2, 3]
    assert scheduler.queued == 2
    assert decode(scheduler) == [1, 2, 3]

    scheduler = Scheduler(BlockPool(100_000), PAGE, 30)
    for handle in range(1, 5):
        scheduler.enqueue(live(handle, MAX_PREFILL_TOKENS // 2))
    assert prefill(scheduler) == [1, 2]


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = Scheduler(BlockPool(100), PAGE, 8)
    scheduler.enqueue(live(1, 12))
    prefill(scheduler)
    twin = live(1, 12)
    twin.handle = 2
    scheduler.enqueue(twin)
    step = scheduler.next_step()
    assert isinstance(step, Prefill)
    # The last page is computed: a forward pass needs at least one token.
    assert (step.uncached, twin.computed) == (4, 8)


def test_the_last_to_join_is_retracted_and_resumes_first() -> None:
    pool = BlockPool(8)
    scheduler = Scheduler(pool, PAGE, 8)
    one, two = live(1, 12), live(2, 12)
    scheduler.enqueue(one)
    scheduler.enqueue(two)
    assert prefill(scheduler) == [1, 2]
    text: list[int] = []
    while len(decode(scheduler)) == 2:
        assert pool.used <= 8
    assert two.allocation is None
    text = list(two.output)
    scheduler.enqueue(live(3, 4, priority=9))
    while one.allocation is not None and len(one) < 30:
        assert decode(scheduler) == [1]
    scheduler.drop(one)
    # It comes before even the urgent one, and goes on where it was.
    assert prefill(scheduler)[0] == 2
    assert two.output[: len(text)] == text
    assert len(two.output) == len(text) + 1


def test_dropping_frees_from_every_place() -> None:
    pool = BlockPool(12)
    scheduler = Scheduler(pool, PAGE, 8)
    waiting, starting, running = live(1, 40), live(2, 8), live(3, 8)
    scheduler.enqueue(running)
    prefill(scheduler)
    scheduler.enqueue_receivable(starting)
    assert list(scheduler.admit_receivable()) == [starting]
    scheduler.enqueue(waiting)
    assert scheduler.queued == 1
    for each in (waiting, starting, running):
        scheduler.drop(each)
    assert (scheduler.queued, pool.used) == (0, 0)
    assert scheduler.next_step() is None
    # What was computed stays; what was never received does not.
    assert pool.idle == 2
