"""Which placements are possible, and what is said when none is."""

from __future__ import annotations

import pytest

from fixtures.holders import worker_info
from fixtures.routing import Router, request
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.common_pb2 import Role, WorkerInfo, WorkerState
from kvmesh.v1.errors_pb2 import ErrorCode

P, D, A = Role.ROLE_PREFILL, Role.ROLE_DECODE, Role.ROLE_AGGREGATED


def members(*infos: WorkerInfo) -> Router:
    router = Router(policy="random")
    router.put(*infos)
    return router


async def found(router: Router, model: str = "", exclude: tuple[str, ...] = ()) -> set[str]:
    answer = await router.route(request(model=model, exclude_worker_ids=exclude, explain=True))
    return {f"{c.prefill_id}+{c.decode_id}" if c.prefill_id else c.decode_id for c in answer.candidates}


async def refused(router: Router, model: str = "", exclude: tuple[str, ...] = ()) -> KvmeshError:
    with pytest.raises(KvmeshError) as caught:
        await router.route(request(model=model, exclude_worker_ids=exclude))
    assert router.service.state().leases == router.service.state().held == 0
    return caught.value


async def test_aggregated_workers_and_pairs() -> None:
    router = members(worker_info("p0", P), worker_info("p1", P), worker_info("d0", D), worker_info("a0", A))
    assert await found(router) == {"a0", "p0+d0", "p1+d0"}


@pytest.mark.parametrize("state", [WorkerState.WORKER_STATE_STARTING, WorkerState.WORKER_STATE_DRAINING])
async def test_only_ready_workers(state: WorkerState) -> None:
    assert await found(members(worker_info("a", A), worker_info("b", A, state=state))) == {"a"}
    error = await refused(members(worker_info("b", A, state=state)), "tiny")
    assert error.code == ErrorCode.ERROR_CODE_NO_WORKER_READY
    assert error.retry_after_ms > 0


async def test_excluded_workers_are_not_used() -> None:
    router = members(worker_info("p", P), worker_info("d", D), worker_info("a", A))
    assert await found(router, exclude=("p",)) == {"a"}
    assert await found(router, exclude=("a",)) == {"p+d"}
    with pytest.raises(KvmeshError) as caught:
        await router.route(request(exclude_worker_ids=("a", "d")))
    assert caught.value.code == ErrorCode.ERROR_CODE_NO_WORKER_READY


async def test_models_by_name_and_alias() -> None:
    big = worker_info("b", A, model="big")
    big.model.aliases[:] = ["large"]
    router = members(worker_info("a", A), big)
    assert await found(router, "tiny") == {"a"}
    assert await found(router, "default") == {"a"}
    assert await found(router, "big") == {"b"}
    assert await found(router, "large") == {"b"}


async def test_an_alias_of_several_models_names_none() -> None:
    router = members(worker_info("a", A), worker_info("b", A, model="big"))
    error = await refused(router, "default")
    assert error.code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    assert "big, tiny" in error.message
    router.members.drop("b")
    assert await found(router, "default") == {"a"}


async def test_an_unknown_model_is_not_found_and_the_known_are_named() -> None:
    error = await refused(members(worker_info("a", A)), "huge")
    assert error.code == ErrorCode.ERROR_CODE_MODEL_NOT_FOUND
    assert error.param == "model"
    assert "tiny" in error.message


async def test_without_workers_no_name_is_wrong() -> None:
    assert (await refused(members(), "huge")).code == ErrorCode.ERROR_CODE_NO_WORKER_READY
    loading = worker_info("a", A, model="", state=WorkerState.WORKER_STATE_STARTING)
    assert (await refused(members(loading), "huge")).code == ErrorCode.ERROR_CODE_NO_WORKER_READY


async def test_several_models_must_be_named() -> None:
    error = await refused(members(worker_info("a", A), worker_info("b", A, model="big")))
    assert error.code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    assert "big, tiny" in error.message


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [({"model": "big"}, {}), ({"engine": "sglang"}, {}), ({"page_size": 32}, {})],
)
async def test_incompatible_halves_are_not_paired(prefill: dict, decode: dict) -> None:
    router = members(worker_info("p", P, **prefill), worker_info("d", D, **decode))
    assert (await refused(router, "tiny")).code == ErrorCode.ERROR_CODE_NO_WORKER_READY


async def test_several_sets_of_compatible_halves_serve_one_model() -> None:
    router = members(
        worker_info("p", P),
        worker_info("d", D),
        worker_info("p32", P, page_size=32),
        worker_info("d32", D, page_size=32),
        worker_info("alone", P, engine="sglang"),
    )
    assert await found(router) == {"p+d", "p32+d32"}
    assert await found(router, exclude=("d",)) == {"p32+d32"}


async def test_a_prefill_worker_without_bootstrap_is_not_used() -> None:
    prefill = worker_info("p", P)
    prefill.ClearField("bootstrap")
    assert "no prefill worker" in (await refused(members(prefill, worker_info("d", D)))).message


async def test_the_message_says_what_is_missing() -> None:
    assert "no decode worker" in (await refused(members(worker_info("p", P)))).message
    assert "no prefill worker" in (await refused(members(worker_info("d", D)))).message


async def test_a_role_that_changes() -> None:
    router = members(worker_info("x", A))
    assert await found(router) == {"x"}
    router.put(worker_info("x", D))
    with pytest.raises(KvmeshError, match="no prefill worker"):
        await router.route(request())
