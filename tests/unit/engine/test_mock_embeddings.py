"""The mock engine as one that embeds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from fixtures.engines import Running, refused, request
from kvmesh.common.config import load_config
from kvmesh.engine.contract import Bootstrap, FinishReason, Role, StepOutput
from kvmesh.v1.errors_pb2 import ErrorCode

SIZE = 32
CONTEXT = 64


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    mock: dict[str, Any] = {"embedding_size": SIZE, "context_length": CONTEXT, "prefill_base_ms": 50.0}
    config = load_config(None, {"model": {"task": "embed"}, "engine": {"kind": "mock", "mock": mock}})
    running = await Running.start(config, Role.AGGREGATED)
    yield running
    await running.close()


async def embed(running: Running, token_ids: list[int]) -> np.ndarray:
    (output,) = await running.run(request(token_ids))
    assert output.finish is not None
    assert (output.finish.reason, list(output.token_ids)) == (FinishReason.STOP, [])
    assert output.cached is not None
    return np.array(output.embedding)


async def test_vectors_are_the_tokens(running: Running) -> None:
    assert running.info.embedding_size == SIZE
    one, again = await embed(running, [5, 6, 7]), await embed(running, [5, 6, 7])
    assert np.array_equal(one, again)
    assert np.linalg.norm(one) == pytest.approx(1)
    # Two tokens of three are nearer than none.
    assert one @ await embed(running, [5, 6, 8]) > one @ await embed(running, [9, 10, 11])
    assert len(await embed(running, [1] * CONTEXT)) == SIZE
    assert running.idle()
    assert running.engine.load().output_tokens_total == 0


async def test_what_cannot_be_embedded_is_refused(running: Running) -> None:
    long = await refused(running.engine, request([1] * (CONTEXT + 1)))
    assert long.code == ErrorCode.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED
    assert "65 tokens" in long.message
    assert (await refused(running.engine, request([]))).code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    split = request([1], bootstrap=Bootstrap("127.0.0.1", 1, 1))
    assert (await refused(running.engine, split)).code == ErrorCode.ERROR_CODE_WRONG_ROLE


async def test_an_abort_ends_it(running: Running) -> None:
    outputs: list[StepOutput] = []
    other = running.run(request([3]))
    handle = running.engine.submit(request([1, 2]), outputs.extend)
    running.engine.abort(handle)
    await other
    (output,) = outputs
    assert output.finish is not None
    assert output.finish.reason is FinishReason.CANCELLED
    assert not output.embedding
    assert running.idle()
