"""Slots are exact under any program of requests through the service, and every lease ends once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random

import pytest

from fixtures.holders import PAGE_SIZE, worker_info
from fixtures.routing import Router, request
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.common_pb2 import Role
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import RouteResponse

TTL_S = 10.0


def blocks(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


async def test_an_aggregated_lease() -> None:
    router = Router()
    router.put(worker_info("a"))
    lease = (await router.route(request(tokens=100))).lease.id
    assert router.slots("a") == (1, 100, 7)
    assert router.report(lease, prefill_done=True)
    assert router.slots("a") == (1, 0, 7)
    assert router.report(lease, output_tokens=29)
    assert router.slots("a") == (1, 0, 9)
    # Reports may come late or twice: what was reached stays reached.
    assert router.report(lease, output_tokens=5)
    assert router.slots("a") == (1, 0, 9)
    assert router.report(lease, ended=True)
    assert router.slots("a") == (0, 0, 0)
    assert not router.report(lease, ended=True)
    assert not router.report(lease, output_tokens=50)
    assert router.slots("a") == (0, 0, 0)


async def test_a_split_lease_leaves_prefill_when_the_prompt_is_computed() -> None:
    router = Router()
    router.put(worker_info("p", Role.ROLE_PREFILL), worker_info("d", Role.ROLE_DECODE))
    lease = (await router.route(request(tokens=100))).lease.id
    assert (router.slots("p"), router.slots("d")) == ((1, 100, 7), (1, 0, 7))
    # The first token says as much as `prefill_done`, which may come later or not at all.
    router.report(lease, output_tokens=1)
    assert (router.slots("p"), router.slots("d")) == ((0, 0, 0), (1, 0, 7))
    router.report(lease, prefill_done=True)
    assert router.slots("p") == (0, 0, 0)
    router.report(lease, output_tokens=50, ended=True)
    assert router.slots("d") == (0, 0, 0)


async def test_progress_renews_and_silence_reclaims() -> None:
    router = Router(policy="random", lease_ttl_s=TTL_S)
    router.put(worker_info("a"))
    live, dead = [(await router.route(request())).lease.id for _ in range(2)]
    for tokens in range(5):
        await router.wait(4)
        assert router.report(live, output_tokens=tokens)
    state = router.service.state()
    assert (state.leases, state.leases_expired_total) == (1, 1)
    assert not router.report(dead, ended=True)
    assert router.report(live, ended=True)
    assert router.slots("a") == (0, 0, 0)


async def test_ids_are_unique_and_not_zero() -> None:
    router = Router(policy="random")
    router.put(worker_info("a"))
    ids = []
    for _ in range(1000):
        ids.append((await router.route(request())).lease.id)
        router.report(ids[-1], ended=True)
    assert len(set(ids)) == 1000
    assert all(0 < lease < 2**64 for lease in ids)


@dataclass
class Known:
    """A live lease by literal bookkeeping."""

    prefill: str
    decode: str
    prompt: int
    uncached: int
    deadline: float
    output: int = 0
    done: bool = False


def expected(live: dict[int, Known], worker: str) -> tuple[int, int, int]:
    requests = queued = taken = 0
    for lease in live.values():
        if lease.decode == worker:
            requests += 1
            taken += blocks(lease.prompt + lease.output)
        if lease.prefill == worker and not lease.done:
            queued += lease.uncached
            if lease.decode != worker:
                requests += 1
                taken += blocks(lease.prompt)
    return requests, queued, taken


@pytest.mark.parametrize("policy", ["kv", "random", "session"])
@pytest.mark.parametrize("seed", range(4))
async def test_random_programs(policy: str, seed: int) -> None:
    random, router = Random(seed), Router(policy, TTL_S, seed)
    router.put(
        worker_info("a"),
        worker_info("p", Role.ROLE_PREFILL),
        worker_info("q", Role.ROLE_PREFILL),
        worker_info("d", Role.ROLE_DECODE),
    )
    workers = ["a", "p", "q", "d"]
    live: dict[int, Known] = {}
    asked: dict[asyncio.Task[RouteResponse], int] = {}
    ended = expired = placed = 0

    def collect() -> None:
        nonlocal placed
        for task in [task for task in asked if task.done()]:
            prompt = asked.pop(task)
            if (error := task.exception()) is not None:
                # It waited for as long as any may.
                assert isinstance(error, KvmeshError)
                assert error.code == ErrorCode.ERROR_CODE_RATE_LIMITED
                assert error.retry_after_ms > 0
                continue
            placed, response = placed + 1, task.result()
            assert response.lease.id not in live
            live[response.lease.id] = Known(
                prefill=response.placement.prefill.id or response.placement.decode.id,
                decode=response.placement.decode.id,
                prompt=prompt,
                uncached=prompt - response.expected.cached.device,
                deadline=router.now + TTL_S,
            )

    for step in range(600):
        action = random.random()
        known = [*live, random.getrandbits(64)]
        if action < 0.35:
            prompt = random.randrange(1, 500)
            chain = [random.randrange(1, 40)] if prompt >= PAGE_SIZE else []
            session = f"s{random.randrange(4)}"
            asked[await router.ask(request(chain, prompt, session_id=session))] = prompt
        elif action < 0.7:
            lease, output, done = random.choice(known), random.randrange(200), random.random() < 0.3
            assert router.report(lease, prefill_done=done, output_tokens=output) == (lease in live)
            if lease in live:
                entry = live[lease]
                entry.output = max(entry.output, output)
                entry.done = entry.done or done or output > 0
                entry.deadline = router.now + TTL_S
        elif action < 0.85:
            lease = random.choice(known)
            assert router.report(lease, ended=True) == (live.pop(lease, None) is not None)
            ended += 1
        elif action < 0.9 and asked:
            task = random.choice(list(asked))
            del asked[task]
            task.cancel()
        else:
            router.now += random.random() * 3
            overdue = [lease for lease, entry in live.items() if entry.deadline <= router.now]
            router.routing.tick()
            expired += len(overdue)
            for lease in overdue:
                del live[lease]
        await router.turns()
        collect()
        state = router.service.state()
        assert (state.leases, state.held) == (len(live), len(asked)), step
        assert state.leases_expired_total == expired
        for worker in workers:
            assert router.slots(worker) == expected(live, worker), step
    assert placed > 100
    assert ended > 30
    assert expired > 0
    for task in asked:
        task.cancel()
    for lease in list(live):
        assert router.report(lease, ended=True)
    await router.turns()
    state = router.service.state()
    assert (state.leases, state.held) == (0, 0)
    assert all(router.slots(worker) == (0, 0, 0) for worker in workers)
    assert router.routing.models["tiny"].selector.held == 0
