"""What a worker says of its model."""

from __future__ import annotations

import pytest

from kvmesh.common import metrics
from kvmesh.common.config import load_config
from kvmesh.common.errors import KvmeshError
from kvmesh.engine.contract import Role
from kvmesh.engine.worker.registration import Registration
from kvmesh.v1.errors_pb2 import ErrorCode


@pytest.mark.parametrize("key", ["tool_format", "reasoning_format"])
def test_a_format_that_is_not_known(key: str) -> None:
    config = load_config(None, {"model": {key: "hermse"}})
    with pytest.raises(
        KvmeshError, match=rf"`model.{key}` 'hermse' is not known; one of: auto, none, "
    ) as caught:
        Registration(config, Role.DECODE, "decode-0", 1, metrics.worker("decode"))
    assert caught.value.code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
