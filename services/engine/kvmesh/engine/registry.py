"""Engines by name. An engine's packages are imported only when it is made."""

from __future__ import annotations

from kvmesh.common.config import Config
from kvmesh.engine.contract import Engine, Role


def make_engine(
    config: Config,
    role: Role,
    *,
    model_path: str,
    worker_id: str,
    bootstrap_host: str,
    kvbm_socket: str | None = None,
) -> Engine:
    """The engine `config.engine.kind` names, not started.

    `model_path` holds the checkpoint and tokenizer; decode engines reach a prefill engine by
    `bootstrap_host`; `kvbm_socket` is the node's store, None to do without.
    """
    match config.engine.kind:
        case "sglang":
            from kvmesh.engine.sglang.engine import SglangEngine as Chosen
        case "mock":
            from kvmesh.engine.mock import MockEngine as Chosen
    return Chosen(
        config,
        role,
        model_path=model_path,
        worker_id=worker_id,
        bootstrap_host=bootstrap_host,
        kvbm_socket=kvbm_socket,
    )
