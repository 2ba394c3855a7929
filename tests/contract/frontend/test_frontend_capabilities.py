"""What a body needs is asked of the router; what no worker has is refused, by its name."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fixtures.frontend import MODEL, Frontend, error_of, frontend, make
from fixtures.scripted_worker import ROLE_AGGREGATED, ScriptedWorker
from kvmesh.core import hash_tokens, namespace_seed
from kvmesh.v1.common_pb2 import (
    CAPABILITY_CONSTRAIN,
    CAPABILITY_GENERATE,
    CAPABILITY_LOGPROBS,
)

SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {}}},
}


@asynccontextmanager
async def serving(*members: ScriptedWorker, **settings: Any) -> AsyncIterator[Frontend]:
    """A frontend before these workers."""
    async with frontend(**settings) as front:
        await front.join(*members)
        try:
            yield front
        finally:
            for member in members:
                await member.kill()


async def ask(front: Frontend, **fields: Any) -> dict[str, Any]:
    response = await front.chat(max_tokens=2, **fields)
    assert response.status_code == 200, response.text
    return response.json()


async def test_needs_follow_from_the_body(answer_ids: list[int]) -> None:
    async with serving(make(ROLE_AGGREGATED, answer_ids)) as front:
        plain, constrained = [CAPABILITY_GENERATE], [CAPABILITY_GENERATE, CAPABILITY_CONSTRAIN]
        for fields, needs in (
            ({}, plain),
            ({"response_format": {"type": "text"}}, plain),
            ({"response_format": SCHEMA}, constrained),
            ({"response_format": {"type": "json_object"}}, constrained),
            ({"tools": [TOOL], "tool_choice": "required"}, constrained),
            ({"logprobs": True}, [CAPABILITY_GENERATE, CAPABILITY_LOGPROBS]),
        ):
            await ask(front, **fields)
            asked = front.router.requests.pop()
            assert (list(asked.needs), asked.adapter) == (needs, ""), fields


@pytest.mark.parametrize("with_router", [True, False])
@pytest.mark.parametrize(
    ("fields", "param", "name"),
    [
        ({"response_format": SCHEMA}, "response_format.json_schema.schema", "constrain"),
        ({"logprobs": True}, "logprobs", "logprobs"),
    ],
)
async def test_what_no_worker_has_is_named(
    answer_ids: list[int], with_router: bool, fields: dict[str, Any], param: str, name: str
) -> None:
    worker = make(ROLE_AGGREGATED, answer_ids, capabilities=[CAPABILITY_GENERATE])
    async with serving(worker, with_router=with_router) as front:
        response = await front.chat(**fields)
        assert response.status_code == 400
        error = error_of(response)
        assert (error["code"], error["param"]) == ("unsupported_parameter", param)
        assert f"no worker of model `{MODEL}` has the capability `{name}`" in error["message"]
        assert not front.router.requests
        assert not worker.received
        listed = (await front.http.get(f"/v1/models/{MODEL}")).json()["capabilities"]
        assert (listed["constraints"], listed["logprobs"]) == (False, False)


@pytest.mark.parametrize("with_router", [True, False])
async def test_of_several_workers_those_that_can_are_asked(answer_ids: list[int], with_router: bool) -> None:
    """Without a router, too."""
    plain = make(ROLE_AGGREGATED, answer_ids, capabilities=[CAPABILITY_GENERATE])
    able = make(ROLE_AGGREGATED, answer_ids, 1, adapters=["terse"])
    async with serving(plain, able, with_router=with_router) as front:
        for _ in range(4):
            await ask(front, response_format=SCHEMA)
            assert (await ask(front, model="terse"))["model"] == "terse"
        assert not plain.received
        assert [request.adapter for request in able.received] == ["", "terse"] * 4


async def test_adapters_are_models_with_a_parent(answer_ids: list[int]) -> None:
    worker = make(ROLE_AGGREGATED, answer_ids, adapters=["terse", "org/rude"])
    async with serving(worker, aliases={"gpt-4o": MODEL}) as front:
        listed = (await front.http.get("/v1/models")).json()["data"]
        assert [(one["id"], one["parent"]) for one in listed] == [
            (MODEL, None),
            ("org/rude", MODEL),
            ("terse", MODEL),
        ]
        found = (await front.http.get("/v1/models/org/rude")).json()
        assert (found["parent"], found["capabilities"]["chat"]) == (MODEL, True)
        names = ["terse", f"{MODEL}:terse", "default:terse", "gpt-4o:terse"]
        assert found["aliases"] == [f"{MODEL}:org/rude", "default:org/rude", "gpt-4o:org/rude"]
        for name in names:
            assert (await ask(front, model=name))["model"] == "terse"
            asked = front.router.requests.pop()
            assert (asked.model, asked.adapter) == (MODEL, "terse")
        for name in ("blunt", f"{MODEL}:blunt", "other:terse", f"{MODEL}:"):
            response = await front.chat(model=name)
            assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


async def test_blocks_of_an_adapter_are_its_own(answer_ids: list[int]) -> None:
    worker = make(ROLE_AGGREGATED, answer_ids, adapters=["terse"])
    async with serving(worker) as front:
        prompt = list(range(300, 364))
        for model in (MODEL, "terse"):
            body = {"model": model, "prompt": prompt, "max_tokens": 1, "kvmesh": {"tenant": "acme"}}
            assert (await front.http.post("/v1/completions", json=body)).status_code == 200
        seeds = [namespace_seed(cache_salt=salt) for salt in ("tenant:acme", "tenant:acme/adapter:terse")]
        hashes = [tuple(request.block_hashes) for request in front.router.requests]
        assert hashes == [tuple(hash_tokens(prompt, 16, seed).tolist()) for seed in seeds]
        # Engines add the adapter themselves.
        assert [(r.cache_salt, r.adapter) for r in worker.received] == [
            ("tenant:acme", ""),
            ("tenant:acme", "terse"),
        ]
