"""The frontend as HTTP clients see it, before workers that tests script."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tokenizers import Tokenizer

from fixtures.frontend import (
    ANSWER,
    CONTEXT_LENGTH,
    EOS,
    EXPLAIN,
    MODEL,
    Split,
    chunks_of,
    endless,
    frontend,
    hello,
    make,
)
from fixtures.scripted_worker import ROLE_AGGREGATED
from fixtures.waiting import eventually
from kvmesh.v1.engine_pb2 import EngineRequest


async def test_openai_client_whole(split: Split) -> None:
    answer = await split.front.openai.chat.completions.create(**hello())
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(split.decode.script(EngineRequest()))
    assert answer.usage.prompt_tokens == len(split.decode.received[0].token_ids)
    assert answer.model == MODEL
    await split.idle()


async def test_openai_client_streamed(split: Split) -> None:
    stream = await split.front.openai.chat.completions.create(
        **hello(stream=True, stream_options={"include_usage": True})
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert [c.choices[0].finish_reason for c in chunks[-2:-1]] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1
    await split.idle()


async def test_completions(split: Split) -> None:
    client = split.front.openai.completions
    whole = await client.create(model="default", prompt="Once", max_tokens=5)
    assert (whole.choices[0].finish_reason, whole.object) == ("length", "text_completion")
    pieces = [c async for c in await client.create(model=MODEL, prompt=[5, 6, 7], max_tokens=5, stream=True)]
    assert "".join(c.choices[0].text for c in pieces) == whole.choices[0].text
    assert list(split.decode.received[1].token_ids) == [5, 6, 7]
    # OpenAI's default for this endpoint.
    await client.create(model=MODEL, prompt="x")
    assert split.decode.received[2].sampling.max_new_tokens == 16
    await split.idle()


async def test_both_halves_get_the_same_request(split: Split) -> None:
    await split.front.chat(temperature=0, seed=7, max_tokens=3)
    prefill, decode = split.prefill.received[0], split.decode.received[0]
    assert prefill.token_ids == decode.token_ids
    assert prefill.sampling == decode.sampling
    assert prefill.sampling.temperature == 0
    assert prefill.bootstrap == decode.bootstrap
    assert 0 < prefill.bootstrap.room < 2**63
    assert len(prefill.traceparent) == 55
    assert prefill.timeout_ms > 0
    route = split.front.router.requests[0]
    assert route.prompt_tokens == len(decode.token_ids)
    assert len(route.block_hashes) == len(decode.token_ids) // 16
    assert route.max_new_tokens == 3


@pytest.mark.parametrize("include_usage", [False, True])
async def test_explain(split: Split, include_usage: bool) -> None:
    fields: dict[str, Any] = {"kvmesh": {"explain": True, "policy": "random", "session_id": "s"}}
    whole = (await split.front.chat(**fields)).json()["kvmesh"]
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if include_usage else {}
    response = await split.front.chat(stream=True, **options, **fields)
    chunks = chunks_of(response.text)
    assert not any("kvmesh" in chunk for chunk in chunks[:-1])
    for explained in (whole, chunks[-1]["kvmesh"]):
        assert explained["placement"] == {
            "mode": "disaggregated",
            "prefill": "prefill-0",
            "decode": "decode-0",
        }
        assert explained["cached_tokens"] == {"device": 16, "host": 0, "nvme": 0, "network": 0}
        timing = explained["timing_ms"]
        assert set(timing) == {"queue", "route", "prefill", "transfer", "ttft", "total"}
        assert (timing["queue"], timing["prefill"], timing["transfer"]) == (1, 2, 3)
        assert 0 < timing["route"] < timing["ttft"] < timing["total"]
        assert explained["policy"] == "random"
        assert explained["candidates"][0]["terms"] == {"queue": 1.5}
    assert response.headers["x-request-id"] == chunks[-1]["kvmesh"]["request_id"]
    assert split.front.router.requests[0].session_id == "s"


async def test_aggregated(answer_ids: list[int]) -> None:
    async with frontend() as front:
        worker = make(ROLE_AGGREGATED, answer_ids)
        await front.join(worker)
        body = (await front.chat(**EXPLAIN)).json()
        assert body["kvmesh"]["placement"] == {
            "mode": "aggregated",
            "prefill": None,
            "decode": "aggregated-0",
        }
        assert not worker.received[0].HasField("bootstrap")
        await eventually(lambda: front.idle(worker), timeout=2)
        await worker.kill()


async def test_headers(split: Split) -> None:
    response = await split.front.http.post(
        "/v1/chat/completions",
        json=hello(top_a=1, **{"bad\nname": 2}),
        headers={"x-request-id": "mine-1", "traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"},
    )
    assert response.headers["x-request-id"] == "mine-1"
    assert response.headers["x-kvmesh-ignored-params"] == "top_a,bad%0Aname"
    assert split.decode.received[0].request_id == "mine-1"
    assert split.decode.received[0].traceparent.split("-")[1] == "ab" * 16
    made = (await split.front.chat()).headers
    assert made["x-request-id"].startswith("req_")
    assert "x-kvmesh-ignored-params" not in made


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_ends_both_engines(split: Split, stream: bool) -> None:
    split.decode.step_s = 0.001
    response = await split.front.chat(stop=[" Paris. 🗼", "nowhere"], stream=stream)
    if stream:
        chunks = chunks_of(response.text)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == ("The capital of France is", "stop")
    await split.idle()
    assert split.decode.cancelled


async def test_answer_is_bounded_by_the_context(split: Split) -> None:
    split.decode.script = endless
    body = (await split.front.chat(max_tokens=100_000)).json()
    assert body["usage"]["total_tokens"] == CONTEXT_LENGTH
    assert body["choices"][0]["finish_reason"] == "length"


async def test_32_streams_at_once_do_not_mix(split: Split, tokenizer: Tokenizer) -> None:
    split.decode.script = lambda request: [*request.token_ids, EOS]
    split.decode.step_s = 0.002
    prompts = [f"story number {i} about {'very ' * (i % 7)}small things" for i in range(32)]

    async def ask(prompt: str) -> str:
        stream = await split.front.openai.completions.create(
            model=MODEL, prompt=prompt, stream=True, max_tokens=200
        )
        return "".join([c.choices[0].text async for c in stream if c.choices])

    assert await asyncio.gather(*map(ask, prompts)) == prompts
    await split.idle()


async def test_metrics(split: Split) -> None:
    before = (await split.front.http.get("/metrics")).text
    await split.front.chat()
    after = (await split.front.http.get("/metrics")).text

    def value(text: str, name: str) -> float:
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    for name in (
        'kvmesh_frontend_requests_total{endpoint="/v1/chat/completions",status="200"}',
        "kvmesh_frontend_time_to_first_token_seconds_count",
        "kvmesh_frontend_input_sequence_tokens_count",
        "kvmesh_frontend_output_sequence_tokens_count",
        'kvmesh_frontend_request_duration_seconds_count{endpoint="/v1/chat/completions"}',
    ):
        assert value(after, name) == value(before, name) + 1, name
    assert value(after, "kvmesh_frontend_inter_token_latency_seconds_count") > 0
    assert value(after, "kvmesh_frontend_in_flight_requests{") == 1  # This one.
