"""What a worker says of its model."""

from __future__ import annotations

from typing import Any

import pytest

from kvmesh.common import metrics
from kvmesh.common.config import load_config
from kvmesh.common.errors import KvmeshError
from kvmesh.engine.contract import EngineInfo, EngineLoad, Probe, Role, StoreTraffic
from kvmesh.engine.mock.engine import MockEngine
from kvmesh.engine.model import ModelSource
from kvmesh.engine.worker.registration import Registration
from kvmesh.v1.common_pb2 import (
    CAPABILITY_CONSTRAIN,
    CAPABILITY_EMBED,
    CAPABILITY_GENERATE,
    CAPABILITY_LOGPROBS,
    Capability,
)
from kvmesh.v1.errors_pb2 import ErrorCode


@pytest.mark.parametrize("key", ["tool_format", "reasoning_format"])
def test_a_format_that_is_not_known(key: str) -> None:
    config = load_config(None, {"model": {key: "hermse"}})
    with pytest.raises(
        KvmeshError, match=rf"`model.{key}` 'hermse' is not known; one of: auto, none, "
    ) as caught:
        Registration(config, Role.DECODE, "decode-0", 1, metrics.worker("decode"))
    assert caught.value.code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("facts", "capabilities"),
    [
        ({}, [CAPABILITY_GENERATE, CAPABILITY_LOGPROBS]),
        ({"constraints": True}, [CAPABILITY_GENERATE, CAPABILITY_LOGPROBS, CAPABILITY_CONSTRAIN]),
        ({"embedding_size": 8}, [CAPABILITY_EMBED]),
    ],
)
async def test_what_the_engine_can_do(facts: dict[str, Any], capabilities: list[Capability]) -> None:
    config = load_config(None, {"engine": {"kind": "mock"}})
    registration = Registration(config, Role.AGGREGATED, "a", 1, metrics.worker("aggregated"))
    info = EngineInfo(Role.AGGREGATED, 64, 100, 16, 4, 1, (2,), adapters=("x", "y"), **facts)
    engine = MockEngine(config, Role.AGGREGATED, model_path="", worker_id="a")
    registration.ready(engine, info, ModelSource("m", "/nowhere"), Probe())
    model = registration.info().model
    assert sorted(model.capabilities) == sorted(capabilities)
    assert list(model.adapters) == ["x", "y"]


async def test_totals_of_the_store_are_counted_on_from_an_engine_that_began_anew() -> None:
    family = metrics.worker("aggregated")
    config = load_config(None, {"engine": {"kind": "mock"}})
    registration = Registration(config, Role.AGGREGATED, "a", 1, family)
    engine = MockEngine(config, Role.AGGREGATED, model_path="", worker_id="a")

    def counted() -> list[float]:
        metric_samples = [*family.store_pages.collect(), *family.store_failed_loads.collect()]
        samples = {(s.name, s.labels.get("what")): s.value for m in metric_samples for s in m.samples}
        pages = [
            samples["kvmesh_aggregated_store_pages_total", what] for what in ("offloaded", "loaded", "shed")
        ]
        return [*pages, samples["kvmesh_aggregated_store_failed_loads_total", None]]

    info = EngineInfo(Role.AGGREGATED, 64, 100, 16, 4, 1, (2,))
    registration.ready(engine, info, ModelSource("m", "/nowhere"), Probe())
    registration.info()
    before = counted()
    for now in (StoreTraffic(offloaded=5, loaded=3, failed_loads=1), StoreTraffic(offloaded=2, shed=4)):
        engine.load = lambda now=now: EngineLoad(store=now)
        registration.info()
        registration.info()
    assert [after - was for after, was in zip(counted(), before, strict=True)] == [7, 3, 4, 1]
