"""A valid body to the vectors it asks for, the same from REST and gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvmesh.common.errors import invalid
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.models import Model
from kvmesh.frontend.protocol import EmbeddingRequest
from kvmesh.frontend.serving.call import Call, check_embeds, most_tokens, within_context
from kvmesh.frontend.serving.session import Session
from kvmesh.frontend.tenants.charge import Share
from kvmesh.v1.engine_pb2 import SamplingParams

# Inputs of one request that are placed at a time: engines batch some, and other requests have their turn.
_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Vectors:
    """What a request's inputs became."""

    model: str
    # A row an input, in their order; little-endian.
    rows: NDArray[np.float32]
    prompt_tokens: int


async def embed(
    gateway: Gateway,
    body: EmbeddingRequest,
    request_id: str,
    *,
    received: float,
    timeout_s: float | None = None,
) -> Vectors:
    """Each input is an engine request of its own, so that the router spreads them over the workers.

    Raises KvmeshError when one cannot be had: then the others are cancelled, as they are with the caller.
    """
    model = gateway.model(body.model)
    check_embeds(model)
    size = model.info.embedding_size
    if body.dimensions is not None and body.dimensions > size:
        raise invalid(
            f"dimensions must not be more than {size}, as many as this model's vectors have", "dimensions"
        )
    calls = await _calls(gateway, body, model, request_id, received, timeout_s)
    rows = np.array(await _vectors(gateway, calls), dtype="<f4")
    if body.dimensions is not None and body.dimensions < size:
        rows = _shortened(rows, body.dimensions)
    return Vectors(model.name, rows, sum(len(call.token_ids) for call in calls))


async def _vectors(gateway: Gateway, calls: Sequence[Call]) -> list[Sequence[float]]:
    turns = asyncio.Semaphore(_AT_ONCE)

    async def run(call: Call) -> Sequence[float]:
        async with turns:
            with closing(Session(gateway.mesh, call)) as session:
                await session.start()
                return session.attempt.embedding

    tasks = [asyncio.create_task(run(call)) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _shortened(rows: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    rows = rows[:, :dimensions]
    # A vector may be nothing but what was cut off.
    length = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return (rows / length).astype("<f4")


async def _encoded(model: Model, text: str, param: str) -> list[int]:
    encoded = model.tokenizer.encode(text, limit=most_tokens(model, embeds=True))
    return await within_context(model, encoded, param, embeds=True)


async def _calls(
    gateway: Gateway,
    body: EmbeddingRequest,
    model: Model,
    request_id: str,
    received: float,
    timeout_s: float | None,
) -> list[Call]:
    calls: list[Call] = []
    inputs = body.inputs()
    for number, given in enumerate(inputs):
        if number % _AT_ONCE == 0:
            # Short texts are tokenized without leaving the loop.
            await asyncio.sleep(0)
        param = f"input[{number}]" if len(inputs) > 1 else "input"
        calls.append(
            gateway.call(
                f"{request_id}-{number}" if number else request_id,
                model,
                await _encoded(model, given, param) if isinstance(given, str) else given,
                SamplingParams(),
                param=param,
                received=received,
                ids_from_client=not isinstance(given, str),
                default_output=0,
                embeds=True,
                timeout_s=timeout_s,
                policy=body.kvmesh.policy,
                session_id=body.session_id(),
                tenant=body.kvmesh.tenant,
                priority=body.kvmesh.priority or 0,
                deadline_ms=body.kvmesh.deadline_ms,
                share=Share(request=not number, prompt=True),
            )
        )
    return calls
