"""When those go that wait, where room comes up that no report tells of."""

from __future__ import annotations

import asyncio

import pytest

from fixtures.holders import worker_info
from fixtures.routing import Router, request
from kvmesh.v1.common_pb2 import WorkerInfo, WorkerState


@pytest.fixture
async def router() -> Router:
    return Router()


def roomy(worker_id: str) -> WorkerInfo:
    """A worker that is never out of blocks, so that only its queue can be full."""
    info = worker_info(worker_id)
    info.kv.total_blocks = 1_000_000
    return info


@pytest.mark.parametrize(("tokens", "rest"), [(8_000, 0), (100_000, 5)])
async def test_what_waits_goes_at_once_to_a_worker_that_joins(router: Router, tokens: int, rest: int) -> None:
    """Held by plans, and in line where a queue is full. A millisecond passes: no other look is due."""
    router.service.start()
    router.put(roomy("a"))
    await router.route(request([1], tokens=tokens))
    waiting = [await router.ask(request([n], tokens=tokens)) for n in range(2, 3 + rest)]
    assert router.service.state().held == 1 + rest
    router.put(worker_info("b", state=WorkerState.WORKER_STATE_STARTING))
    await router.turns()
    assert router.service.state().held == 1 + rest, "it is not ready"
    router.put(worker_info("b"))
    await router.turns()
    router.now += 0.001
    await router.turns()
    placed = [task.result().placement.decode.id for task in waiting if task.done()]
    assert placed == ["b"]
    assert router.service.state().held == rest
    router.service.close()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_what_waits_goes_at_once_where_a_cancel_makes_room(router: Router) -> None:
    router.service.start()
    router.put(roomy("a"))
    await router.route(request([1], tokens=100_000))
    held = [await router.ask(request([n], tokens=100_000)) for n in range(2, 6)]
    behind = await router.ask(request([9], policy="round-robin"))
    # Its worker's queue has room again, but plans hold as many as they may while others wait in line.
    await router.wait(4.9)
    assert router.service.state().held == 5
    held[0].cancel()
    await router.turns()
    assert behind.result().placement.decode.id == "a"
    assert router.service.state().held == 3
    router.service.close()
    await asyncio.gather(*held, return_exceptions=True)
