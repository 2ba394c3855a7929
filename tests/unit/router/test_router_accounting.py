"""Slots are exact under any program of requests through the service, and every lease ends once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random

import pytest
from prometheus_client import REGISTRY

from fixtures.holders import PAGE_SIZE, worker_info
from fixtures.routing import Router, request
from kvmesh.common.errors import KvmeshError
from kvmesh.router import leases
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
    assert router.routing.leaked == 0
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


async def test_a_lease_that_nobody_will_end_is_leaked() -> None:
    router = Router(policy="random", lease_ttl_s=TTL_S)
    router.put(worker_info("a"))
    response = await router.route(request())
    assert leaked() == 0
    # As if the router had forgotten what its selector placed.
    selector = router.routing.models["tiny"].selector
    selector.submit(router.routing.turns.now(), 99, prompt_tokens=100, blocks=[], policy="random")
    assert leaked() == 1
    for _ in range(3):
        await router.wait(TTL_S / 2)
        router.report(response.lease.id, output_tokens=1)
    assert (leaked(), router.service.state().leases) == (0, 1)


def leaked() -> float | None:
    return REGISTRY.get_sample_value("kvmesh_router_leaked_leases")


# A worker in one of its lives.
Life = tuple[str, int]

ROLES = {
    "a": Role.ROLE_AGGREGATED,
    "p": Role.ROLE_PREFILL,
    "q": Role.ROLE_PREFILL,
    "d": Role.ROLE_DECODE,
}


@dataclass
class Known:
    """A live lease by literal bookkeeping."""

    prefill: Life
    decode: Life
    prompt: int
    uncached: int
    deadline: float
    output: int = 0
    done: bool = False


def expected(live: dict[int, Known], worker: Life) -> tuple[int, int, int]:
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
async def test_random_programs(policy: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Leases whose holder's stream broke have until the next turn.
    monkeypatch.setattr(leases, "ORPHANED_S", 0.0)
    random, router = Random(seed), Router(policy, TTL_S, seed)
    router.put(*(worker_info(name, role) for name, role in ROLES.items()))
    lives, down = dict.fromkeys(ROLES, 1), set[str]()
    live: dict[int, Known] = {}
    asked: dict[asyncio.Task[RouteResponse], int] = {}
    ended = expired = placed = orphaned = unplaced = 0

    def collect() -> None:
        nonlocal placed, unplaced
        for task in [task for task in asked if task.done()]:
            prompt = asked.pop(task)
            if (error := task.exception()) is not None:
                # It waited for as long as any may, or nobody is left.
                assert isinstance(error, KvmeshError)
                nobody = error.code == ErrorCode.ERROR_CODE_NO_WORKER_READY
                assert nobody or error.code == ErrorCode.ERROR_CODE_RATE_LIMITED
                assert error.retry_after_ms > 0
                unplaced += nobody
                continue
            placed, response = placed + 1, task.result()
            assert response.lease.id not in live
            decode, prefill = response.placement.decode, response.placement.prefill
            live[response.lease.id] = Known(
                prefill=(prefill.id, prefill.incarnation) if prefill.id else (decode.id, decode.incarnation),
                decode=(decode.id, decode.incarnation),
                prompt=prompt,
                uncached=prompt - response.expected.cached.device,
                deadline=router.now + TTL_S,
            )

    def pass_time(seconds: float) -> None:
        nonlocal expired
        router.now += seconds
        overdue = [lease for lease, entry in live.items() if entry.deadline <= router.now]
        router.routing.tick()
        expired += len(overdue)
        for lease in overdue:
            del live[lease]

    def report(lease: int, output: int, done: bool) -> None:
        assert router.report(lease, prefill_done=done, output_tokens=output) == (lease in live)
        if lease in live:
            entry = live[lease]
            entry.output = max(entry.output, output)
            entry.done = entry.done or done or output > 0
            entry.deadline = router.now + TTL_S

    def crash_or_return(name: str) -> None:
        if name in down:
            down.remove(name)
            lives[name] += 1
            router.put(worker_info(name, ROLES[name], incarnation=lives[name]))
        else:
            down.add(name)
            router.members.drop(name)
        # What waited goes to the newcomer at the next look.
        pass_time(0.0)

    async def break_stream() -> None:
        """A caller is cut off; of some of its leases news comes another way."""
        nonlocal orphaned
        lost = [lease for lease in live if random.random() < 0.3]
        router.routing.leases.orphan(lost)
        pass_time(0.001)
        for lease in [lease for lease in lost if lease in live]:
            if random.random() < 0.5:
                report(lease, 1, False)
            else:
                del live[lease]
                orphaned += 1
        await router.turns()

    for step in range(800):
        action = random.random()
        known = [*live, random.getrandbits(64)]
        if action < 0.35:
            prompt = random.randrange(1, 500)
            chain = [random.randrange(1, 40)] if prompt >= PAGE_SIZE else []
            session = f"s{random.randrange(4)}"
            asked[await router.ask(request(chain, prompt, session_id=session))] = prompt
        elif action < 0.7:
            report(random.choice(known), random.randrange(200), random.random() < 0.3)
        elif action < 0.82:
            lease = random.choice(known)
            assert router.report(lease, ended=True) == (live.pop(lease, None) is not None)
            ended += 1
        elif action < 0.87 and asked:
            task = random.choice(list(asked))
            del asked[task]
            task.cancel()
        elif action < 0.9:
            crash_or_return(random.choice(list(ROLES)))
        elif action < 0.92:
            await break_stream()
        else:
            pass_time(random.random() * 3)
        await router.turns()
        collect()
        state = router.service.state()
        assert (state.leases, state.held) == (len(live), len(asked)), step
        assert state.leases_expired_total == expired
        for worker in ROLES.keys() - down:
            assert router.slots(worker) == expected(live, (worker, lives[worker])), step
        assert router.routing.leaked == 0
    assert placed > 100
    assert ended > 30
    assert min(expired, orphaned, unplaced) > 0
    for task in asked:
        task.cancel()
    for lease in list(live):
        assert router.report(lease, ended=True)
    await router.turns()
    state = router.service.state()
    assert (state.leases, state.held) == (0, 0)
    assert all(router.slots(worker) == (0, 0, 0) for worker in ROLES.keys() - down)
    assert router.routing.models["tiny"].selector.held == 0
