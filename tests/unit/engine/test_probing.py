"""What is measured of an engine is what it takes: the mock engine on a virtual clock says both."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvmesh.common.config import load_config
from kvmesh.engine import probing
from kvmesh.engine.contract import EngineRequest, Probe, Role, Sampling, StepSink
from kvmesh.engine.mock import MockEngine
from kvmesh.engine.probing import Probing

# A pass takes 4 ms and 0.05 ms a token, a step 10 ms and 0.5 ms a stream.
LAW = {"prefill_base_ms": 4, "prefill_token_ms": 0.05, "decode_base_ms": 10, "decode_sequence_ms": 0.5}


class Clock:
    """Time that goes on when nothing else does, to where somebody sleeps until."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        waking = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._numbers), waking))
        await waking

    async def run(self) -> None:
        while True:
            # Let everybody who can go on do so.
            for _ in range(20):
                await asyncio.sleep(0)
            if self._sleepers:
                self.now, _, waking = heapq.heappop(self._sleepers)
                if not waking.cancelled():
                    waking.set_result(None)


@asynccontextmanager
async def probed(role: Role, **mock: Any) -> AsyncIterator[tuple[MockEngine, Callable[[], Any]]]:
    """An engine, and what measures it."""
    clock = Clock()
    config = load_config(None, {"engine": {"kind": "mock", "mock": LAW | mock}})
    engine = MockEngine(config, role, model_path="", worker_id="w", clock=clock, sleep=clock.sleep)
    info = await engine.start()
    running = asyncio.create_task(clock.run())

    def rehearse(token_ids: Sequence[int], new_tokens: int, sink: StepSink) -> int:
        sampling = Sampling(temperature=0, max_new_tokens=new_tokens, ignore_eos=True)
        return engine.submit(EngineRequest("probe", token_ids, sampling), sink)

    try:
        yield engine, Probing(info, rehearse, engine.abort, clock).measure
    finally:
        running.cancel()
        await engine.close()


async def test_a_law_is_found() -> None:
    async with probed(Role.AGGREGATED) as (engine, measure):
        probe: Probe = await measure()
        by_tokens, said = dict(probe.prefill), dict((await engine.probe()).prefill)
        assert by_tokens.keys() == {16, 64, 256, 1024, 4096}
        assert by_tokens == {tokens: pytest.approx(ms) for tokens, ms in said.items()}
        assert [(streams, ms) for streams, _, ms in probe.decode] == [
            (streams, pytest.approx(10 + 0.5 * streams)) for streams in (1, 8)
        ]
        # Two blocks of the pool's 4,096 each.
        assert [share for _, share, _ in probe.decode] == [2 / 4096, 16 / 4096]
        assert probe.transfer == ()
        assert engine.load().requests == 0


async def test_a_slow_engine_measures_what_it_has_time_for() -> None:
    """64 tokens take 260 ms and 256 tokens 1,028 ms, which is more than there is."""
    async with probed(Role.AGGREGATED, prefill_token_ms=4, decode_base_ms=200) as (_, measure):
        probe = await measure()
        assert probe.prefill == ((16, pytest.approx(68)), (64, pytest.approx(260)))
        assert probe.decode[0] == (1, 2 / 4096, pytest.approx(200.5))


async def test_what_runs_at_the_end_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still for the engine, so that it never answers, and goes on for who measures."""
    monkeypatch.setattr(probing, "PREFILL_S", 0.05)
    monkeypatch.setattr(probing, "ALL_S", 0.1)
    config = load_config(None, {"engine": {"kind": "mock", "mock": {"prefill_base_ms": 60_000}}})
    engine = MockEngine(config, Role.AGGREGATED, model_path="", worker_id="w")
    info = await engine.start()

    def rehearse(token_ids: Sequence[int], new_tokens: int, sink: StepSink) -> int:
        return engine.submit(EngineRequest("probe", token_ids, Sampling(max_new_tokens=new_tokens)), sink)

    try:
        assert await asyncio.wait_for(Probing(info, rehearse, engine.abort).measure(), 20) == Probe()
        assert engine.load().requests == 0
    finally:
        await engine.close()
