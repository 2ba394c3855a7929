"""The main job on real SGLang, NIXL and NATS: a prompt computed by one engine, decoded by another."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
from collections.abc import AsyncGenerator
from contextlib import aclosing

import httpx
import openai
import pytest

from fixtures.mesh import Mesh, wait_for
from kvmesh.common.grpc.client import Channels
from kvmesh.v1.engine_pb2 import SamplingParams
from kvmesh.v1.frontend_pb2 import FrontendServiceGenerateRequest, FrontendServiceGenerateResponse
from kvmesh.v1.frontend_pb2_grpc import FrontendServiceStub

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

QUESTION = "What is the capital of France?"
# Lengths in tokens, roughly: from less than one block to many blocks that end inside one.
PROMPT_TOKENS = [5, 15, 16, 17, 64, 250, 700, 1500]


def prompt_ids(length: int) -> list[int]:
    """A prompt of its own for every length: no two share a first block."""
    return [(length * 7919 + position * 131) % 40_000 + 1_000 for position in range(length)]


async def complete(mesh: Mesh, prompt: list[int], max_tokens: int = 16) -> dict:
    async with httpx.AsyncClient(timeout=120) as client:
        body = {
            "model": "default",
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": max_tokens,
            "kvmesh": {"explain": True},
        }
        answer = await client.post(f"{mesh.url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def generate(mesh: Mesh, prompt: list[int]) -> tuple[list[int], FrontendServiceGenerateResponse]:
    """The greedy tokens, over gRPC, and the last response."""
    sampling = SamplingParams(temperature=0, max_new_tokens=16, ignore_eos=True)
    request = FrontendServiceGenerateRequest(
        model="default", token_ids=prompt, sampling=sampling, explain=True
    )
    channels, tokens, last = Channels(), [], FrontendServiceGenerateResponse()
    try:
        async for last in FrontendServiceStub(channels.get(mesh.grpc)).Generate(request, timeout=120):
            tokens += last.token_ids
    finally:
        await channels.close()
    return tokens, last


def transferred_bytes(mesh: Mesh) -> int:
    return mesh.workers()["prefill-0"]["transferred_bytes_total"]


async def test_split_equals_aggregated_and_nixl_moves_exactly_the_prompt(
    split_mesh: Mesh, aggregated_mesh: Mesh
) -> None:
    worker = split_mesh.workers()["prefill-0"]
    for length in PROMPT_TOKENS:
        before = transferred_bytes(split_mesh)
        prompt = prompt_ids(length)
        (split, ran), (whole, _) = await asyncio.gather(
            generate(split_mesh, prompt), generate(aggregated_mesh, prompt)
        )
        assert split == whole, f"{length} tokens"
        assert len(split) == 16
        assert ran.usage.prompt_tokens == length
        assert ran.kvmesh.mode == "disaggregated"
        blocks = -(-length // worker["page_size"])
        moved = transferred_bytes(split_mesh) - before
        assert moved == blocks * worker["block_bytes"], f"{length} tokens"


def test_openai_client_streams_and_does_not(split_mesh: Mesh) -> None:
    with openai.OpenAI(base_url=f"{split_mesh.url}/v1", api_key="none", max_retries=0) as client:
        request = {
            "model": "default",
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            "max_tokens": 24,
            "extra_body": {"kvmesh": {"explain": True}},
        }
        whole = client.chat.completions.create(**request)
        chunks = list(
            client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
        )
    text = whole.choices[0].message.content
    assert text is not None
    assert "Paris" in text
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == text
    assert sum(bool(chunk.choices) for chunk in chunks) >= 4
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens  # type: ignore[union-attr]
    for answer in (whole, next(chunk for chunk in chunks if (chunk.model_extra or {}).get("kvmesh"))):
        explained = (answer.model_extra or {})["kvmesh"]
        assert explained["placement"] == {
            "mode": "disaggregated",
            "prefill": "prefill-0",
            "decode": "decode-0",
        }
        assert set(explained["timing_ms"]) == {"queue", "route", "prefill", "transfer", "ttft", "total"}
        assert explained["timing_ms"]["ttft"] <= explained["timing_ms"]["total"]


async def test_concurrent_streams_answer_as_each_alone(split_mesh: Mesh) -> None:
    prompts = [prompt_ids(40 + 3 * number) for number in range(32)]
    alone = [(await complete(split_mesh, prompt, 8))["choices"][0]["text"] for prompt in prompts]

    async def streamed(prompt: list[int]) -> str:
        body = {"model": "default", "prompt": prompt, "temperature": 0, "max_tokens": 8, "stream": True}
        chunks = [chunk async for chunk in stream(split_mesh, body)]
        return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])

    assert list(await asyncio.gather(*map(streamed, prompts))) == alone


async def stream(mesh: Mesh, body: dict) -> AsyncGenerator[dict]:
    """The chunks of a streamed completion; closing hangs up."""
    async with (
        httpx.AsyncClient(timeout=120) as client,
        client.stream("POST", f"{mesh.url}/v1/completions", json=body) as answer,
    ):
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


async def read_chunks(mesh: Mesh, body: dict, count: int, seen: list[dict]) -> None:
    """Stream into `seen` until it has `count` chunks, then hang up; 0: never."""
    async with aclosing(stream(mesh, body)) as chunks:
        async for chunk in chunks:
            seen.append(chunk)
            if len(seen) == count:
                return


@pytest.mark.parametrize("after_chunks", [0, 4], ids=["before-first-token", "mid-stream"])
async def test_disconnect_frees_both_engines(split_mesh: Mesh, after_chunks: int) -> None:
    """At random moments: while the prompt waits or is computed, and between tokens."""
    moments = random.Random(after_chunks)
    took: list[float] = []
    wait_for(split_mesh.idle, 10, "an idle mesh to start from")
    for attempt in range(5):
        seen: list[dict] = []
        body = {
            "model": "default",
            # It keeps the engine busy for a while; a step that has begun goes to its end, though.
            "prompt": prompt_ids(200 + 10 * after_chunks + attempt),
            "max_tokens": 400,
            "ignore_eos": True,
            "stream": True,
        }
        # The answer's headers come with its first token: who leaves before it is still waiting for them.
        patience = moments.uniform(0.01, 0.1) if not after_chunks else None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await read_chunks(split_mesh, body, after_chunks and moments.randint(1, 8), seen)
        assert bool(seen) == bool(after_chunks)
        took.append(wait_for(split_mesh.idle, 4, f"both engines to be free again (attempt {attempt})"))
    # Each within 2 s, where the machine has the time to look.
    assert statistics.median(took) < 2, took


async def test_bad_input_reaches_no_engine(split_mesh: Mesh) -> None:
    context = min(worker["context_length"] for worker in split_mesh.workers().values())
    async with httpx.AsyncClient(base_url=split_mesh.url, timeout=30) as client:
        answer = await client.post(
            "/v1/completions", json={"model": "default", "prompt": prompt_ids(context + 7), "max_tokens": 4}
        )
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert str(context) in error["message"]
        assert str(context + 7) in error["message"]
        answer = await client.post(
            "/v1/completions", json={"model": "default", "prompt": [10**9], "max_tokens": 4}
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "prompt"
    assert split_mesh.idle()
    assert "Paris" in split_mesh.chat(QUESTION)["choices"][0]["message"]["content"]
