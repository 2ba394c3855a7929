"""LoRA adapters, as every engine checks them."""

from __future__ import annotations

from kvmesh.common.errors import KvmeshError
from kvmesh.engine.contract import EngineInfo
from kvmesh.v1.errors_pb2 import ErrorCode


def check_adapter(name: str, info: EngineInfo) -> None:
    """Raise KvmeshError(UNSUPPORTED) where a request names an adapter that the engine has not."""
    if name and name not in info.adapters:
        known = ", ".join(info.adapters) or "none"
        raise KvmeshError(
            ErrorCode.ERROR_CODE_UNSUPPORTED,
            f"the engine has no adapter `{name}`; it has: {known}",
            param="adapter",
        )
