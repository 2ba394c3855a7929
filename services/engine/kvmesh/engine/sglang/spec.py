"""What the worker tells the launcher about the engine it wants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvmesh.common.config import Config
from kvmesh.engine.contract import Role


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine to launch; sent by the worker as JSON."""

    role: str
    model_path: str
    worker_id: str
    page_size: int
    dtype: str
    # `generate` or `embed`.
    task: str
    context_length: int | None
    host: str
    bootstrap_port: int
    log_level: str
    # Threads of a CPU engine where the environment does not say; how many engines share this machine.
    engines: int
    # Socket of the process that forks launchers; empty: there is none.
    forkserver: str
    # Directory of this engine's sockets and notes.
    directory: str
    kvbm_socket: str | None
    # Its blocks' model there; empty: what the model's files say.
    model_name: str
    # The configuration's own SGLang arguments: all roles', then this role's.
    arguments: list[dict[str, Any]]

    @classmethod
    def of(
        cls,
        config: Config,
        role: Role,
        model_path: str,
        worker_id: str,
        directory: str,
        kvbm_socket: str | None,
    ) -> EngineSpec:
        engine, workers = config.engine, config.workers
        by_role = {
            Role.PREFILL: engine.prefill_args,
            Role.DECODE: engine.decode_args,
            Role.AGGREGATED: engine.aggregated_args,
        }
        return cls(
            role=role.value,
            model_path=model_path,
            worker_id=worker_id,
            page_size=engine.page_size,
            dtype=config.model.dtype,
            task=config.model.task,
            context_length=config.model.context_length,
            host=config.worker.host,
            bootstrap_port=config.worker.bootstrap_port,
            log_level=config.telemetry.log_level,
            engines=workers.prefill + workers.decode + workers.aggregated,
            forkserver=engine.forkserver_socket if engine.forkserver else "",
            directory=directory,
            kvbm_socket=kvbm_socket,
            model_name=config.model.name,
            arguments=[engine.args, by_role[role]],
        )
