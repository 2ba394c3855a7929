"""Embeddings over scripted workers: order, spread, the same over gRPC, and nothing left of who leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest

from fixtures.embedding_worker import VECTORS, EmbeddingWorker, vector
from fixtures.frontend import Frontend, error_of, frontend
from fixtures.scripted_worker import retryable_error
from fixtures.waiting import eventually
from kvmesh.v1.frontend_pb2 import EmbedRequest, Prompt, TokenIds


@pytest.fixture
async def workers() -> AsyncIterator[list[EmbeddingWorker]]:
    made = [EmbeddingWorker(0), EmbeddingWorker(1)]
    yield made
    for worker in made:
        await worker.kill()


@pytest.fixture
async def front(workers: list[EmbeddingWorker]) -> AsyncIterator[Frontend]:
    async with frontend() as front:
        await front.join(*workers)
        yield front
        await eventually(lambda: front.idle(*workers), 5, "nothing to be left")


def ask(front: Frontend, inputs: Any, **fields: Any) -> Any:
    return front.http.post("/v1/embeddings", json={"model": VECTORS, "input": inputs, **fields})


async def test_answers_are_in_the_order_of_the_inputs(
    front: Frontend, workers: list[EmbeddingWorker]
) -> None:
    inputs = [[1], [2, 3], [4, 5, 6], [7] * 8, [8]]
    answer = (await ask(front, inputs)).json()
    assert [one["index"] for one in answer["data"]] == [0, 1, 2, 3, 4]
    for one, ids in zip(answer["data"], inputs, strict=True):
        assert one["embedding"] == pytest.approx(vector(ids), abs=1e-6)
    assert answer["usage"] == {"prompt_tokens": 15, "total_tokens": 15}
    assert (answer["object"], answer["model"]) == ("list", VECTORS)
    assert sorted(len(worker.received) for worker in workers) == [2, 3]


async def test_grpc_says_the_same(front: Frontend) -> None:
    prompts = [Prompt(tokens=TokenIds(ids=ids)) for ids in ([1], [2, 3])]
    answer = await front.grpc.Embed(EmbedRequest(model=VECTORS, inputs=prompts))
    assert [list(one.values) for one in answer.embeddings] == [
        pytest.approx(vector(ids), abs=1e-6) for ids in ([1], [2, 3])
    ]
    assert answer.usage.prompt_tokens == 3
    short = await front.grpc.Embed(EmbedRequest(model=VECTORS, inputs=prompts, dimensions=1))
    assert [list(one.values) for one in short.embeddings] == [[1.0], [1.0]]
    prompts[1] = Prompt(tokens=TokenIds(ids=[1] * 9))
    with pytest.raises(grpc.aio.AioRpcError, match=r"inputs\[1\] has 9 tokens") as caught:
        await front.grpc.Embed(EmbedRequest(model=VECTORS, inputs=prompts))
    assert caught.value.code() == grpc.StatusCode.OUT_OF_RANGE


async def test_what_the_endpoint_does_not_know_is_named(front: Frontend) -> None:
    answer = await ask(front, [1], input_type="query")
    assert answer.status_code == 200
    assert answer.headers["x-kvmesh-ignored-params"] == "input_type"


async def test_a_client_that_leaves_cancels_all_of_its_inputs(
    front: Frontend, workers: list[EmbeddingWorker]
) -> None:
    for worker in workers:
        worker.stall.clear()
    async with httpx.AsyncClient(base_url=front.url) as client:
        body = {"model": VECTORS, "input": [[1]] * 100}
        asking = asyncio.create_task(client.post("/v1/embeddings", json=body))
        # A request's inputs are placed some at a time.
        await eventually(lambda: sum(len(worker.live) for worker in workers) == 64, 5)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await eventually(lambda: front.idle(*workers), 5, "nothing to be left")
    assert sum(len(worker.cancelled) for worker in workers) == 64


async def test_an_input_is_tried_elsewhere_before_all_fail(
    front: Frontend, workers: list[EmbeddingWorker]
) -> None:
    workers[0].failure = retryable_error()
    assert (await ask(front, [[1], [2], [3], [4]])).status_code == 200
    workers[1].failure = retryable_error()
    answer = await ask(front, [[1], [2], [3], [4]])
    assert answer.status_code == 503
    assert "the engine is full" in error_of(answer)["message"]
