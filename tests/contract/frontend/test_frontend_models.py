"""Models and readiness follow the workers."""

from __future__ import annotations

from fixtures.frontend import (
    CONTEXT_LENGTH,
    MODEL,
    error_of,
    frontend,
    make,
)
from fixtures.scripted_worker import ROLE_AGGREGATED, ROLE_DECODE, ROLE_PREFILL
from fixtures.waiting import eventually
from kvmesh.core import hash_tokens, namespace_seed
from kvmesh.v1.common_pb2 import WORKER_STATE_DRAINING


async def test_without_workers() -> None:
    async with frontend(with_router=False) as front:
        assert (await front.http.get("/health")).status_code == 200
        assert (await front.http.get("/ready")).status_code == 503
        assert (await front.http.get("/v1/models")).json() == {
            "object": "list",
            "data": [],
            "has_more": False,
            "first_id": None,
            "last_id": None,
        }
        response = await front.chat()
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert error_of(response)["code"] == "no_worker_ready"


async def test_models_with_one_tokenizer_have_blocks_of_their_own(answer_ids: list[int]) -> None:
    async with frontend() as front:
        alone = make(ROLE_AGGREGATED, answer_ids)
        salted = make(ROLE_AGGREGATED, answer_ids, 1, name="other", aliases=[], cache_salt="model:other")
        await front.join(alone, salted)
        await eventually(lambda: len(front.models.usable()) == 2)
        prompt = list(range(300, 364))
        for tenant in ("", "acme"):
            for model in (MODEL, "other"):
                body = {"model": model, "prompt": prompt, "max_tokens": 1, "kvmesh": {"tenant": tenant}}
                assert (await front.http.post("/v1/completions", json=body)).status_code == 200
        assert [request.cache_salt for request in alone.received] == ["", "tenant:acme"]
        assert [request.cache_salt for request in salted.received] == [
            "model:other",
            "model:other/tenant:acme",
        ]
        routed = [tuple(request.block_hashes) for request in front.router.requests]
        assert len(set(routed)) == len(routed) == 4
        seed = namespace_seed(cache_salt="model:other")
        assert routed[1] == tuple(hash_tokens(prompt, 16, seed).tolist())
        await alone.kill()
        await salted.kill()


async def test_models_come_and_go_with_their_workers(answer_ids: list[int]) -> None:
    async with frontend() as front:
        one, other = make(ROLE_AGGREGATED, answer_ids), make(ROLE_AGGREGATED, answer_ids, 1, name="org/other")
        await front.join(one, other)
        await eventually(lambda: len(front.models.usable()) == 2)
        listed = (await front.http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["org/other", MODEL]
        found = (await front.http.get("/v1/models/org/other")).json()
        assert found["max_model_len"] == CONTEXT_LENGTH
        front.discovery.drop(other.id)
        await eventually(lambda: len(front.models.usable()) == 1)
        assert (await front.http.get("/v1/models/org/other")).status_code == 404
        front.discovery.drop(one.id)
        await eventually(lambda: not front.models.ready)
        assert (await front.http.get("/ready")).status_code == 503
        await one.kill()
        await other.kill()


async def test_ready_only_with_a_full_set(answer_ids: list[int]) -> None:
    async with frontend() as front:
        decode, prefill = make(ROLE_DECODE, answer_ids), make(ROLE_PREFILL, answer_ids)
        await decode.start()
        front.discovery.put(decode.info())
        await eventually(lambda: front.models._tokenizers, timeout=30)
        assert (await front.http.get("/ready")).status_code == 503
        response = await front.chat()
        assert (response.status_code, error_of(response)["code"]) == (503, "no_worker_ready")
        await front.join(prefill)
        assert (await front.http.get("/ready")).status_code == 200
        front.discovery.put(decode.info(state=WORKER_STATE_DRAINING))
        await eventually(lambda: not front.models.ready)
        await decode.kill()
        await prefill.kill()
