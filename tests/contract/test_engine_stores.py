"""Real engines beside real stores: greedy output never changes, and KV outlives pool, engine, store and node.

Engines take long to start, so the tests share some, and go through the events of one day in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from fixtures.engines import Running, at, check_outputs, fresh_prompt, greedy, request, tokens_of
from fixtures.kvbm import MIB, Kvbm
from fixtures.nats import NatsServer
from fixtures.waiting import eventually
from kvmesh.common.config import load_config
from kvmesh.engine.contract import CachedTokens, Role, StepOutput
from kvmesh.engine.model import resolve_model
from kvmesh.engine.registry import make_engine
from kvmesh.engine.sglang.engine import SglangEngine

pytestmark = [pytest.mark.sglang, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]

# Several times the pool's tokens, so that each prompt is evicted before it is asked again.
PROMPTS, POOL_TOKENS = 100, 4096
OUTPUT = 6
# What a step costs does not matter here.
TWO_LAYERS = {"json_model_override_args": '{"num_hidden_layers": 2}'}
CLIENTS = 8
# A prompt that is worth fetching.
PAGES = 120


class Node:
    """A store of its own and the engines beside it."""

    def __init__(self, home: Path, name: str, nats: NatsServer) -> None:
        home.mkdir()
        self.store = Kvbm(home, nats.url, host_bytes=256 * MIB, nvme=home / "nvme")
        self.store.environment |= {
            "KVMESH_NODE": f"node-{name}",
            "KVMESH_KVBM__ID": f"kvbm-{name}",
            "KVMESH_KVBM__NVME__CAPACITY": str(512 * MIB),
        }
        self.engines: list[Running] = []

    async def engine(self, role: Role) -> Running:
        config: dict[str, Any] = {
            "model": {"dtype": "float32"},
            "engine": {"kind": "sglang", "args": {"max_total_tokens": POOL_TOKENS, **TWO_LAYERS}},
        }
        loaded = load_config(overrides=config)
        engine = make_engine(
            loaded,
            role,
            model_path=resolve_model(loaded).path,
            worker_id=f"{role}-0",
            bootstrap_host="127.0.0.1",
            kvbm_socket=self.store.socket,
        )
        self.engines.append(Running(engine, await engine.start()))
        return self.engines[-1]

    def figure(self, name: str) -> int:
        """One of the store's metrics; 0 while it cannot be asked."""
        with contextlib.suppress(httpx.TransportError):
            text = httpx.get(f"http://127.0.0.1:{self.store.metrics_port}/metrics").text
            found = [line for line in text.splitlines() if line.startswith(f"kvmesh_kvbm_{name} ")]
            return int(float(found[0].split()[-1])) if found else 0
        return 0

    async def attached(self, engines: int) -> None:
        await eventually(lambda: self.figure("engines") == engines, 30, "engines to find their store")

    async def close(self) -> None:
        for running in self.engines:
            await running.close()
        if self.store.process is not None and self.store.process.poll() is None:
            self.store.end(signal.SIGKILL)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def nodes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Node, Node]]:
    home = tmp_path_factory.mktemp("nodes")
    nats = NatsServer(home)
    nats.start()
    both = Node(home / "a", "a", nats), Node(home / "b", "b", nats)
    try:
        yield both
    finally:
        for node in both:
            await node.close()
        nats.stop()


def prompts() -> list[list[int]]:
    """Some begin alike, so that chains are shared and cut."""
    chance = random.Random(11)
    heads = [[chance.randrange(1_000, 40_000) for _ in range(96)] for _ in range(8)]
    tails = [
        [chance.randrange(1_000, 40_000) for _ in range(20 + chance.randrange(300))] for _ in range(PROMPTS)
    ]
    return [chance.choice(heads) + tail for tail in tails]


PROMPTS_OF_THE_DAY = prompts()


class Answers:
    """What an engine said to all prompts, some at a time."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.cached: dict[int, CachedTokens] = {}

    async def ask(self, prefill: Running, decode: Running | None = None) -> Answers:
        left = list(enumerate(PROMPTS_OF_THE_DAY))

        async def client() -> None:
            while left:
                number, prompt = left.pop(0)
                outputs = await asyncio.gather(*halves(prefill, decode, prompt, OUTPUT))
                for output in outputs:
                    check_outputs(output)
                assert outputs[0][0].cached is not None
                self.tokens[number] = tokens_of(outputs[-1])
                self.cached[number] = outputs[0][0].cached

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return self

    def from_tier(self, tier: str) -> int:
        return sum(getattr(cached, tier) for cached in self.cached.values())


WITHOUT = Answers()


async def test_a_store_changes_no_output_while_the_pool_evicts(nodes: tuple[Node, Node]) -> None:
    node, _ = nodes
    engine = await node.engine(Role.AGGREGATED)
    # Nobody serves its socket yet, so this is an engine without KVBM.
    await WITHOUT.ask(engine)
    assert WITHOUT.from_tier("host") == 0
    await node.store.start()
    await node.attached(1)
    first = await Answers().ask(engine)
    again = await Answers().ask(engine)
    assert first.tokens == again.tokens == WITHOUT.tokens
    assert len(WITHOUT.tokens) == PROMPTS
    asked = sum(map(len, PROMPTS_OF_THE_DAY))
    assert again.from_tier("host") > asked // 2
    assert again.from_tier("device") < asked // 2, "the pool evicts"


async def test_split_requests_share_what_another_engine_computed(nodes: tuple[Node, Node]) -> None:
    """Both halves beside the store: neither changes the output, and what decode adds is found by prefill."""
    node, _ = nodes
    prefill, decode = await asyncio.gather(node.engine(Role.PREFILL), node.engine(Role.DECODE))
    await node.attached(3)
    split = await Answers().ask(prefill, decode)
    assert split.tokens == WITHOUT.tokens
    # Its first requests: what it did not compute, the aggregated engine had.
    assert split.from_tier("host") > sum(map(len, PROMPTS_OF_THE_DAY)) // 2
    page = prefill.info.page_size
    # What was asked before is stored by and by, too.
    stored = -1
    for _ in range(20):
        if stored == (stored := node.figure('stored_total{tier="host"}')):
            break
        await asyncio.sleep(2.5)
    prompt = fresh_prompt(6 * page)
    outputs = await asyncio.gather(*halves(prefill, decode, prompt, 4 * page + 2))
    await eventually(
        lambda: node.figure('stored_total{tier="host"}') >= stored + 10, 30, "the answer to be offloaded"
    )
    follow_up = prompt + tokens_of(outputs[1]) + fresh_prompt(page)
    outputs = await asyncio.gather(*halves(prefill, decode, follow_up, 4))
    cached = outputs[0][0].cached
    assert cached is not None
    assert cached.device >= 5 * page
    assert cached.host >= 4 * page, "blocks of the answer, which the decode engine alone had"
    for engine in (prefill, decode):
        await engine.close()
        node.engines.remove(engine)


async def test_a_killed_engine_finds_its_prefixes_when_it_is_back(nodes: tuple[Node, Node]) -> None:
    node, _ = nodes
    (engine,) = node.engines
    kill(engine)
    await eventually(lambda: node.figure("engines") == 0, 30, "its lease to end")
    assert node.figure('blocks_in_use{tier="host"}') == 0
    await engine.close()
    node.engines.remove(engine)
    engine = await node.engine(Role.AGGREGATED)
    await node.attached(1)
    prompt, page = PROMPTS_OF_THE_DAY[0], engine.info.page_size
    outputs = await engine.run(request(prompt, greedy(OUTPUT)))
    assert outputs[0].cached is not None
    assert outputs[0].cached.host >= len(prompt) // page * page - page
    assert tokens_of(outputs) == WITHOUT.tokens[0]


async def test_a_store_that_was_restarted_has_everything_on_disk(nodes: tuple[Node, Node]) -> None:
    node, _ = nodes
    (engine,) = node.engines
    assert await asyncio.to_thread(node.store.end) == 0
    await node.store.start()
    await node.attached(1)
    prompt, page = PROMPTS_OF_THE_DAY[1], engine.info.page_size
    outputs = await engine.run(request(prompt, greedy(OUTPUT)))
    cached = outputs[0].cached
    assert cached is not None
    assert cached.nvme > 0
    # Its beginning, which others share, may still be in the engine's pool.
    assert cached.device + cached.nvme >= len(prompt) // page * page - page
    assert tokens_of(outputs) == WITHOUT.tokens[1]


async def test_a_prompt_that_another_node_has_computed_is_not_computed_again(
    nodes: tuple[Node, Node],
) -> None:
    first, second = nodes
    (engine,) = first.engines
    page = engine.info.page_size
    prompt = fresh_prompt(PAGES * page + 5)
    before = first.figure('stored_total{tier="host"}')
    text = tokens_of(await engine.run(request(prompt)))
    await eventually(
        lambda: first.figure('stored_total{tier="host"}') >= before + PAGES, 30, "the prompt to be offloaded"
    )
    await engine.close()
    first.engines.remove(engine)
    await second.store.start()
    engine = await second.engine(Role.AGGREGATED)
    await second.attached(1)
    # It learns here how fast it computes; until then it waits for nobody.
    check_outputs(await engine.run(request(fresh_prompt(40 * page))))
    outputs = await engine.run(request(prompt))
    check_outputs(outputs)
    assert outputs[0].cached is not None
    assert outputs[0].cached.network >= (PAGES - 1) * page
    assert outputs[0].cached.device + outputs[0].cached.host + outputs[0].cached.nvme == 0
    assert tokens_of(outputs) == text
    again = await engine.run(request(prompt))
    assert again[0].cached is not None
    assert again[0].cached.device >= (PAGES - 1) * page
    assert again[0].cached.network == 0


def halves(
    prefill: Running, decode: Running | None, prompt: Sequence[int], tokens: int
) -> list[Coroutine[Any, Any, list[StepOutput]]]:
    """A request to be run by both, or by the first alone."""
    if decode is None:
        return [prefill.run(request(prompt, greedy(tokens)))]
    asked = request(prompt, greedy(tokens), at(prefill))
    return [prefill.run(asked), decode.run(asked)]


def kill(running: Running) -> None:
    engine = running.engine
    assert isinstance(engine, SglangEngine)
    assert engine._process is not None
    for pid in engine._process.scheduler_pids:
        os.kill(pid, signal.SIGKILL)
