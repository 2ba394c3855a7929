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
from kvmesh.v1.common_pb2 import WORKER_STATE_DRAINING


async def test_without_workers() -> None:
    async with frontend(with_router=False) as front:
        assert (await front.http.get("/health")).status_code == 200
        assert (await front.http.get("/ready")).status_code == 503
        assert (await front.http.get("/v1/models")).json() == {"object": "list", "data": []}
        response = await front.chat()
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert error_of(response)["code"] == "no_worker_ready"


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
