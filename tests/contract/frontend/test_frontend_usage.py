"""What tenants used: counted by every frontend, kept on the bus."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer

from fixtures.frontend import EOS, MODEL
from fixtures.nats import NatsServer
from fixtures.tenanted import Tenanted, chat, tenanted
from fixtures.waiting import eventually
from kvmesh.cli.bus import with_bucket
from kvmesh.common.buckets import read_all
from kvmesh.common.config import Config
from kvmesh.frontend.tenants.usage import Used, entries_of, sums
from kvmesh.v1.common_pb2 import CachedTokens


async def test_usage_is_kept_by_tenant_and_model_over_restarts(
    nats: NatsServer, answer_ids: list[int]
) -> None:
    async def run() -> dict[str, Any]:
        """Two requests of one tenant and one of another; the usage of one."""
        async with tenanted(nats, answer_ids, count=2) as running:
            keys = {tenant: (await running.key(tenant=tenant))[1] for tenant in ("acme", "rival")}
            await chat(running.fronts[0], keys["rival"], stream=True)
            one, other = [(await chat(front, keys["acme"])).json()["usage"] for front in running.fronts]
            assert one == other
            text = (await running.front.http.get("/metrics")).text
            assert f'kvmesh_frontend_tenant_requests_total{{model="{MODEL}",tenant="rival"}}' in text
            return one

    await run()
    each = await run()
    config = Config.model_validate({"nats": {"url": nats.url}})
    usage = sums(entries_of(await with_bucket(config, config.tenants.usage_bucket, read_all)), 0.0)
    assert set(usage) == {("acme", MODEL), ("rival", MODEL)}
    assert usage["acme", MODEL] == Used(
        requests=4,
        prompt_tokens=4 * each["prompt_tokens"],
        cached_tokens=4 * each["prompt_tokens_details"]["cached_tokens"],
        cached_device_tokens=4 * each["prompt_tokens_details"]["cached_tokens"],
        output_tokens=4 * each["completion_tokens"],
    )
    assert usage["rival", MODEL].requests == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_usage_tells_tiers_and_reasoning_apart(
    one: Tenanted, tokenizer: Tokenizer, stream: bool
) -> None:
    thoughts = tokenizer.encode("<think>Let me see.</think>", add_special_tokens=False).ids
    one.worker.model.reasoning_format = "think"
    one.worker.cached = CachedTokens(device=2, host=3, network=1)
    one.worker.script = lambda _: [*thoughts, 260, EOS]
    one.front.discovery.put(one.worker.info())
    await eventually(lambda: one.front.models.usable()[0].reasoning_format == "think")
    _, text = await one.key()
    answer = await chat(one.front, text, stream=stream)
    await one.usage_of("acme", requests=1)
    used = (await one.usage())["acme", MODEL]
    assert (used.cached_tokens, used.cached_device_tokens, used.cached_host_tokens) == (6, 2, 3)
    assert (used.cached_nvme_tokens, used.cached_network_tokens) == (0, 1)
    assert 0 < used.reasoning_tokens < used.output_tokens
    if not stream:
        said = answer.json()["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert used.reasoning_tokens == said


async def test_choices_of_a_prompt_pay_for_it_once(one: Tenanted) -> None:
    _, text = await one.key(requests_per_minute=100)
    said = (await chat(one.front, text, n=3, max_tokens=4)).json()["usage"]
    assert said["completion_tokens"] == 12
    assert await one.usage_of("acme", requests=1) == said["total_tokens"]
    body = {"model": MODEL, "prompt": ["one two three", "four five six seven"], "max_tokens": 2, "n": 2}
    headers = {"authorization": f"Bearer {text}"}
    more = (await one.front.http.post("/v1/completions", json=body, headers=headers)).json()["usage"]
    assert await one.usage_of("acme", requests=2) == said["total_tokens"] + more["total_tokens"]


async def test_usage_outlives_an_outage_of_the_bus(one: Tenanted) -> None:
    _, text = await one.key()
    await chat(one.front, text)
    one.nats.stop()
    await chat(one.front, text)
    one.nats.start()
    assert await one.usage_of("acme", requests=2)
