"""Measures an engine by running prompts on it, alone and side by side, in a bounded time.

A slow engine measures less: a longer prompt is left out where a shorter one says that it would take too long,
and what still runs at the end is aborted.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from kvmesh.engine.contract import EngineInfo, FinishReason, Probe, Role, StepOutput, StepSink

# Seconds: of the prompts, and of everything.
PREFILL_S, ALL_S = 1.0, 2.0
# Tokens of the prompts, each so many times the one before: a law's parts must stand out from noise.
SHORTEST, LONGEST, GROWTH = 16, 16_384, 4
# A kernel's first run for a size may compile it; the faster of two runs is the engine's.
ROUNDS = 2
# Streams side by side; tokens of the prompt of each, and tokens that it is to give.
STREAMS = (1, 8)
STREAM_PROMPT, STREAM_TOKENS = 16, 5

# Runs a prompt for so many tokens, to the sink, and leaves nothing of it in the cache. Returns its handle;
# raises KvmeshError when the engine has died.
Rehearse = Callable[[Sequence[int], int, StepSink], int]


class Probing:
    """One engine's measurements. `clock` is in seconds."""

    def __init__(
        self,
        info: EngineInfo,
        rehearse: Rehearse,
        abort: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._info, self._rehearse, self._abort, self._clock = info, rehearse, abort, clock

    async def measure(self) -> Probe:
        """What the engine's role does: decode engines compute no prompts, prefill engines give one token."""
        began = self._clock()
        prefill: tuple[tuple[int, float], ...] = ()
        decode: tuple[tuple[int, float, float], ...] = ()
        if self._info.role is not Role.DECODE:
            prefill = await self._prompts(began + PREFILL_S)
        if self._info.role is not Role.PREFILL and not self._info.embedding_size:
            decode = await self._streams(began + ALL_S)
        return Probe(prefill, decode)

    async def _prompts(self, until: float) -> tuple[tuple[int, float], ...]:
        # Engines take somewhat less than their context.
        longest = min(LONGEST, self._info.context_length // 2)
        fastest: dict[int, float] = {}
        for _ in range(ROUNDS):
            tokens, took = SHORTEST, 0.0
            while tokens <= longest:
                # At least as many times as long as the prompt before, as there are tokens more.
                if self._clock() + fastest.get(tokens, GROWTH * took) > until:
                    break
                began = self._clock()
                batch = await self._run(1, tokens, 1, until)
                if not batch.whole:
                    break
                took = batch.steps[-1][0] - began
                fastest[tokens] = min(took, fastest.get(tokens, took))
                tokens *= GROWTH
        return tuple((tokens, 1000 * took) for tokens, took in fastest.items())

    async def _streams(self, until: float) -> tuple[tuple[int, float, float], ...]:
        info = self._info
        found: list[tuple[int, float, float]] = []
        blocks = -(-(STREAM_PROMPT + STREAM_TOKENS) // info.page_size)
        for wanted in STREAMS:
            if self._clock() >= until:
                break
            batch = await self._run(wanted, STREAM_PROMPT, STREAM_TOKENS, until)
            # From one step to the next of as many streams: nobody's prompt was computed in between.
            gaps: dict[int, list[float]] = {}
            for (before, earlier), (at, streams) in pairwise(batch.steps):
                if earlier == streams:
                    gaps.setdefault(streams, []).append(1000 * (at - before))
            if gaps:
                # A small pool does not take all at once.
                most = max(gaps)
                found.append((most, most * blocks / info.total_blocks, statistics.median(gaps[most])))
        return tuple(found)

    async def _run(self, prompts: int, tokens: int, new_tokens: int, until: float) -> _Batch:
        """Run random prompts side by side, to their end or that of the time; the engine is idle then."""
        batch = _Batch(prompts, self._clock)
        chance = random.Random()
        # Random, so that no tier has any of them: it would not be computed then.
        handles = [
            self._rehearse(chance.choices(range(self._info.vocab_size), k=tokens), new_tokens, batch)
            for _ in range(prompts)
        ]
        try:
            async with asyncio.timeout(max(0.0, until - self._clock())):
                await batch.over.wait()
        except TimeoutError:
            for handle in handles:
                self._abort(handle)
            await batch.over.wait()
        return batch


class _Batch:
    """The sink of prompts that run side by side: when each step came, and for how many of them."""

    def __init__(self, prompts: int, clock: Callable[[], float]) -> None:
        self.steps: list[tuple[float, int]] = []
        self.over = asyncio.Event()
        # Whether all of them ended by themselves.
        self.whole = True
        self._left, self._clock = prompts, clock

    def __call__(self, outputs: list[StepOutput]) -> None:
        self.steps.append((self._clock(), len(outputs)))
        finishes = [output.finish for output in outputs if output.finish is not None]
        self.whole &= all(f.reason in (FinishReason.LENGTH, FinishReason.STOP) for f in finishes)
        self._left -= len(finishes)
        if not self._left:
            self.over.set()
