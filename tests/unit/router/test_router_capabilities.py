"""Requests go to workers that have what they need, and nowhere else."""

from __future__ import annotations

import pytest

from fixtures.holders import worker_info
from fixtures.routing import Router, request
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.common_pb2 import (
    CAPABILITY_CONSTRAIN,
    CAPABILITY_EMBED,
    CAPABILITY_GENERATE,
    Capability,
    Role,
    WorkerInfo,
    WorkerState,
)
from kvmesh.v1.errors_pb2 import ErrorCode

PLAIN = [CAPABILITY_GENERATE]
CONSTRAINED = [CAPABILITY_GENERATE, CAPABILITY_CONSTRAIN]


def worker(
    worker_id: str,
    role: Role = Role.ROLE_AGGREGATED,
    *,
    can: list[Capability] | None = None,
    adapters: tuple[str, ...] = (),
    **fields: object,
) -> WorkerInfo:
    info = worker_info(worker_id, role, **fields)  # pyright: ignore[reportArgumentType]
    info.model.capabilities.extend(can or PLAIN)
    info.model.adapters.extend(adapters)
    return info


@pytest.fixture
async def router() -> Router:
    return Router()


async def refusal(router: Router, **fields: object) -> KvmeshError:
    with pytest.raises(KvmeshError) as caught:
        await router.route(request(**fields))  # pyright: ignore[reportArgumentType]
    assert router.routing.live == router.routing.held == 0
    return caught.value


@pytest.mark.parametrize("policy", ["kv", "round-robin", "random", "least-loaded", "power-of-two", "session"])
async def test_only_workers_that_have_it_are_candidates(router: Router, policy: str) -> None:
    router.put(worker("a"), worker("b", can=CONSTRAINED), worker("c", adapters=("x",)))
    for _ in range(8):
        response = await router.route(request(needs=CONSTRAINED, policy=policy, explain=True))
        assert response.placement.decode.id == "b"
        assert [candidate.decode_id for candidate in response.candidates] == ["b"]
        router.report(response.lease.id, ended=True)
        response = await router.route(request(needs=PLAIN, adapter="x", policy=policy))
        assert response.placement.decode.id == "c"
        router.report(response.lease.id, ended=True)


async def test_both_halves_of_a_pair_must_have_it(router: Router) -> None:
    router.put(
        worker("p0", Role.ROLE_PREFILL),
        worker("p1", Role.ROLE_PREFILL, can=CONSTRAINED),
        worker("d0", Role.ROLE_DECODE),
    )
    error = await refusal(router, needs=CONSTRAINED)
    assert error.code == ErrorCode.ERROR_CODE_UNSUPPORTED
    assert "no worker of model `tiny` has the capability `constrain`" in error.message
    router.put(worker("d1", Role.ROLE_DECODE, can=CONSTRAINED))
    for _ in range(8):
        response = await router.route(request(needs=CONSTRAINED))
        placement = response.placement
        assert (placement.prefill.id, placement.decode.id) == ("p1", "d1")
        router.report(response.lease.id, ended=True)


async def test_what_is_missing_for_now_is_waited_for(router: Router) -> None:
    """Unsupported is what no worker has; one that has it and is not ready may be soon."""
    able = worker("b", can=CONSTRAINED, state=WorkerState.WORKER_STATE_DRAINING)
    router.put(worker("a"), able)
    error = await refusal(router, needs=CONSTRAINED)
    assert (error.code, error.retry_after_ms > 0) == (ErrorCode.ERROR_CODE_NO_WORKER_READY, True)
    ready = worker("b", can=CONSTRAINED)
    router.put(ready)
    assert (await router.route(request(needs=CONSTRAINED))).placement.decode.id == "b"
    router.members.drop("b")
    assert (await refusal_of_live(router)).code == ErrorCode.ERROR_CODE_UNSUPPORTED


async def refusal_of_live(router: Router) -> KvmeshError:
    with pytest.raises(KvmeshError) as caught:
        await router.route(request(needs=CONSTRAINED))
    return caught.value


async def test_a_request_that_waits_is_refused_when_the_last_that_could_leaves(router: Router) -> None:
    router.put(worker("a"), worker("b", can=CONSTRAINED))
    first = await router.route(request(tokens=8000, needs=CONSTRAINED))
    assert first.placement.decode.id == "b"
    waiting = await router.ask(request(tokens=8000, needs=CONSTRAINED))
    await router.wait(0.01)
    assert not waiting.done(), "the other worker is idle, and cannot"
    router.members.drop("b")
    with pytest.raises(KvmeshError, match="the capability `constrain`"):
        await waiting


async def test_a_worker_that_changes_what_it_can_is_taken_anew(router: Router) -> None:
    router.put(worker("a"))
    assert "the adapter `x`" in (await refusal(router, needs=PLAIN, adapter="x")).message
    changed = worker("a", adapters=("x",), incarnation=2)
    router.put(changed)
    assert (await router.route(request(needs=PLAIN, adapter="x"))).placement.decode.id == "a"


async def test_embedding_and_generating_workers_of_one_model_are_told_apart(router: Router) -> None:
    router.put(worker("a"), worker("v", can=[CAPABILITY_EMBED]))
    for _ in range(6):
        vector = await router.route(request(needs=[CAPABILITY_EMBED]))
        text = await router.route(request(needs=PLAIN))
        assert (vector.placement.decode.id, text.placement.decode.id) == ("v", "a")
        for lease in (vector.lease.id, text.lease.id):
            router.report(lease, ended=True)
