"""Which requests a step of the mock engine runs, and what it does to their blocks.

Continuous batching as SGLang does it: prefills go first, then one token for everybody who runs; when blocks
run out the request that joined last is retracted and recomputed later. No clock and no I/O in here.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from kvmesh.engine.mock.blocks import BlockPool, page_hashes
from kvmesh.engine.mock.live import LiveRequest

# Uncached tokens of one prefill step, unless a single prompt has more.
MAX_PREFILL_TOKENS = 16_384


@dataclass(slots=True)
class Prefill:
    """Compute the prompts of `batch`; `uncached` tokens in all."""

    batch: list[LiveRequest]
    uncached: int


@dataclass(slots=True)
class Decode:
    """One token for each of `batch`."""

    batch: list[LiveRequest]


class Scheduler:
    """Owns the pool and the queues. A request is in one place at a time; `drop` takes it out of any."""

    def __init__(self, pool: BlockPool, page_size: int, max_batch: int) -> None:
        self.pool = pool
        self._page_size = page_size
        self._max_batch = max_batch
        # To be computed again, before all others: they have an answer under way.
        self._retracted: list[LiveRequest] = []
        # To be computed here; the most urgent first, then in order of arrival.
        self._waiting: list[LiveRequest] = []
        # To be received from a prefill engine, likewise.
        self._receivable: list[LiveRequest] = []
        # Hold blocks: computing or receiving their prompt, and generating.
        self._starting: dict[int, LiveRequest] = {}
        self._running: dict[int, LiveRequest] = {}

    @property
    def queued(self) -> int:
        return len(self._retracted) + len(self._waiting) + len(self._receivable)

    def enqueue(self, live: LiveRequest) -> None:
        """Compute this request's prompt when there is room."""
        insort(self._waiting, live, key=_urgency)

    def enqueue_receivable(self, live: LiveRequest) -> None:
        """Receive this request's prompt when there is room."""
        insort(self._receivable, live, key=_urgency)

    def next_step(self) -> Prefill | Decode | None:
        """What to run now; None when nothing can run. Blocks are taken here."""
        batch: list[LiveRequest] = []
        uncached = 0
        while uncached < MAX_PREFILL_TOKENS:
            queue = self._retracted or self._waiting
            if not queue or not self._start(queue[0]):
                break
            live = queue.pop(0)
            batch.append(live)
            uncached += len(live) - live.computed
        if batch:
            return Prefill(batch, uncached)
        running = self._grow()
        return Decode(running) if running else None

    def admit_receivable(self) -> Iterable[LiveRequest]:
        """Give blocks to those who receive their prompt, as far as they fit, and hand them out."""
        while self._receivable and self._start(self._receivable[0]):
            yield self._receivable.pop(0)

    def computed(self, live: LiveRequest) -> None:
        """The prompt's KV is there, computed or received: its whole pages can be shared."""
        live.computed = len(live)
        self._store(live)

    def run(self, live: LiveRequest) -> None:
        """Let a request whose prompt is there generate from the next step on."""
        self._running[live.handle] = self._starting.pop(live.handle)

    def advance(self, live: LiveRequest) -> None:
        """A decode step has written the KV of the last token."""
        live.computed += 1

    def drop(self, live: LiveRequest) -> None:
        """Take a request out and its blocks back; what it computed stays cached."""
        if self._starting.pop(live.handle, None) is None and self._running.pop(live.handle, None) is None:
            for queue in (self._retracted, self._waiting, self._receivable):
                if live in queue:
                    queue.remove(live)
        self._release(live)

    def _start(self, live: LiveRequest) -> bool:
        """Take the blocks of the tokens so far, if one more token would fit beside them."""
        if len(self._starting) + len(self._running) >= self._max_batch:
            return False
        size = len(live)
        if not live.chain:
            live.chain = self._hash(live, size)
        # At least one token is computed: the engine needs its logits.
        allocation = self.pool.allocate(
            live.chain[: (size - 1) // self._page_size], self._blocks(size), self._blocks(size + 1)
        )
        if allocation is None:
            return False
        live.allocation = allocation
        live.computed = len(allocation.cached) * self._page_size
        self._starting[live.handle] = live
        return True

    def _grow(self) -> list[LiveRequest]:
        """Those who run, each with room for one more token; the last are retracted if there is none."""
        grown: list[LiveRequest] = []
        candidates = list(self._running.values())
        for position, live in enumerate(candidates):
            if live.handle not in self._running:
                # Retracted for one before it.
                continue
            assert live.allocation is not None
            missing = self._blocks(live.computed + 1) - len(live.allocation)
            later = candidates[position + 1 :]
            while missing > 0 and not self.pool.extend(live.allocation, missing):
                victim = later.pop() if later else live
                if victim.handle in self._running:
                    self._retract(victim)
                if victim is live:
                    break
            else:
                grown.append(live)
        return grown

    def _retract(self, live: LiveRequest) -> None:
        del self._running[live.handle]
        self._release(live)
        self._retracted.insert(0, live)

    def _release(self, live: LiveRequest) -> None:
        if live.allocation is None:
            return
        self._store(live)
        self.pool.release(live.allocation)
        live.allocation = None
        live.computed = 0
        live.chain = []

    def _store(self, live: LiveRequest) -> None:
        assert live.allocation is not None
        pages = live.computed // self._page_size
        if pages > len(live.allocation.cached):
            if pages > len(live.chain):
                live.chain = self._hash(live, live.computed)
            self.pool.store(live.allocation, live.chain[:pages])

    def _hash(self, live: LiveRequest, size: int) -> list[int]:
        return page_hashes(live.tokens[:size], self._page_size, live.request.block_salt)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._page_size)


def _urgency(live: LiveRequest) -> int:
    return -live.request.priority
