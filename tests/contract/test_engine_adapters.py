"""LoRA adapters of every engine: named at the start, told apart in the cache, refused where unknown."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from fixtures.adapters import make_adapter
from fixtures.engines import CONFIGS, Running, check_outputs, fresh_prompt, refused, request, tokens_of
from fixtures.waiting import eventually
from kvmesh.cli.plan import has_gpu
from kvmesh.common.config import load_config
from kvmesh.core import hash_tokens, namespace_seed
from kvmesh.engine.contract import FinishReason, Role
from kvmesh.engine.mock.engine import MockEngine
from kvmesh.engine.model import resolve_model
from kvmesh.v1.errors_pb2 import ErrorCode

NEEDS_GPU = pytest.mark.skipif(
    not has_gpu(), reason="SGLang 0.5.23 pins the weights of adapters in memory, which needs CUDA"
)
# As many as the shallow model of the conformance suite has.
LAYERS = 6

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


def sglang_config(directory: Path) -> dict[str, Any]:
    path = resolve_model(load_config()).path
    made = {
        name: str(make_adapter(directory / name, path, layers=LAYERS, loudness=loudness))
        for name, loudness in (("loud", 1.0), ("silent", 0.0))
    }
    config = CONFIGS["sglang"]
    lora = {"enable_lora": True, "lora_paths": made}
    return config | {"engine": {"kind": "sglang", "args": {**config["engine"]["args"], **lora}}}


@pytest_asyncio.fixture(
    loop_scope="module",
    scope="module",
    params=["mock", pytest.param("sglang", marks=[pytest.mark.sglang, NEEDS_GPU])],
)
async def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Running]:
    if request.param == "mock":
        config = {"engine": {"kind": "mock", "mock": {"total_blocks": 256, "adapters": ["silent", "loud"]}}}
    else:
        config = sglang_config(tmp_path_factory.mktemp("adapters"))
    running = await Running.start(load_config(overrides=config), Role.AGGREGATED)
    try:
        yield running
    finally:
        await running.close()


async def test_adapters_are_named_at_the_start(engine: Running) -> None:
    assert sorted(engine.info.adapters) == ["loud", "silent"]


async def test_an_adapter_that_is_not_there_is_refused(engine: Running) -> None:
    error = await refused(engine.engine, request(fresh_prompt(20), adapter="other"))
    assert (error.code, error.param) == (ErrorCode.ERROR_CODE_UNSUPPORTED, "adapter")


async def test_an_adapter_changes_the_answer_and_no_other_does(engine: Running) -> None:
    prompt = fresh_prompt(40)
    said = {}
    for adapter in ("", "silent", "loud", ""):
        outputs = await engine.run(request(prompt, adapter=adapter))
        assert check_outputs(outputs) is FinishReason.LENGTH
        assert said.setdefault(adapter, tokens_of(outputs)) == tokens_of(outputs)
    if not isinstance(engine.engine, MockEngine):
        assert said[""] == said["silent"] != said["loud"]


async def test_the_blocks_of_an_adapter_are_its_own(engine: Running) -> None:
    prompt, page = fresh_prompt(80), engine.info.page_size
    for adapter in ("", "loud", "silent"):
        for time in range(2):
            outputs = await engine.run(request(prompt, adapter=adapter, cache_salt="tenant:t"))
            assert outputs[0].cached is not None
            assert (outputs[0].cached.device > 0) == bool(time), adapter
        salt = f"tenant:t/adapter:{adapter}" if adapter else "tenant:t"
        named = set(hash_tokens(prompt, page, namespace_seed(cache_salt=salt)).tolist())
        await eventually(lambda named=named: named <= engine.blocks, what=f"blocks under {salt}")
