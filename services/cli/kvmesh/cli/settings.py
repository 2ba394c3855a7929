"""The configuration as the command reads it, and what follows from it before anything runs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvmesh.cli.home import Home
from kvmesh.common.config import Config, load_config
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.grpc.client import Channels
from kvmesh.common.served import ModelConfig
from kvmesh.common.tls import MeshTls


def load(file: Path | None, overrides: dict[str, Any] | None = None) -> Config:
    """`load_config` that knows `KVMESH_PORT`, as compose does: short for `KVMESH_FRONTEND__HTTP_PORT`."""
    flags = overrides or {}
    port = os.environ.get("KVMESH_PORT")
    if port and "KVMESH_FRONTEND__HTTP_PORT" not in os.environ:
        flags = flags | {"frontend": flags.get("frontend", {}) | {"http_port": port}}
    return load_config(file, flags)


def running_config(file: Path | None) -> Config:
    """The running mesh's own configuration, where there is one; else the one its home is named by."""
    asked = load_config(file)
    try:
        return Home(asked.home).read_config()
    except KvmeshError:  # none was ever written, or an older version wrote it
        return asked


def mesh_channels(file: Path | None) -> Channels:
    """To the running mesh's processes, with the certificates that they ask for."""
    return Channels(MeshTls.of(running_config(file).tls))


def parse_alias(text: str) -> tuple[str, str]:
    """NAME=MODEL as both. Raises KvmeshError(INVALID_ARGUMENT)."""
    name, _, model = text.partition("=")
    if not name or not model:
        raise invalid(f"--alias {text}: write NAME=MODEL, e.g. gpt-4o=default")
    return name, model


def model_flags(ids: Sequence[str]) -> dict[str, Any]:
    """What `--model`, given once or several times, lays over the configuration."""
    if len(ids) == 1:
        return {"model": {"id": ids[0]}, "models": []}
    return {"model": ModelConfig().model_dump(), "models": [{"id": one} for one in ids]}


def endpoint_url(config: Config) -> str:
    host = config.frontend.host
    local = host in ("0.0.0.0", "127.0.0.1", "::", "::1", "")
    scheme = "https" if config.frontend.tls.cert else "http"
    return f"{scheme}://{'localhost' if local else host}:{config.frontend.http_port}"


class Worker(NamedTuple):
    """A worker that `kvmesh up` starts."""

    # Role and number, e.g. prefill-0; counted over all models.
    name: str
    role: str
    # The configuration as its model's workers have it.
    config: Config


def workers_of(config: Config) -> list[Worker]:
    """All of them, the first model's first."""
    numbers: Counter[str] = Counter()
    workers = []
    for served in config.served():
        for role in ("prefill", "decode", "aggregated"):
            for _ in range(getattr(served.workers, role)):
                workers.append(Worker(f"{role}-{numbers[role]}", role, served))
                numbers[role] += 1
    return workers


def check_workers(config: Config) -> None:
    """Raise KvmeshError(INVALID_ARGUMENT) when the workers of a model could not serve anything."""
    for served in config.served():
        whose = f" of model {served.model.name or served.model.id}" if config.models else ""
        counts = served.workers
        if not (counts.prefill or counts.decode or counts.aggregated):
            raise invalid(
                f"no workers{whose}: set `workers.prefill` and `workers.decode`, or `workers.aggregated`"
            )
        if served.model.task == "embed" and (counts.prefill or counts.decode):
            raise invalid(
                f"embeddings are not split: {whose.removeprefix(' of ') or 'the model'} takes no prefill and "
                "decode workers, set `workers.prefill` and `workers.decode` to 0, "
                "and `workers.aggregated` to 1 or more"
            )
        if bool(counts.prefill) != bool(counts.decode) and not counts.aggregated:
            missing = "decode" if counts.prefill else "prefill"
            raise invalid(
                f"prefill and decode workers{whose} work in pairs: set `workers.{missing}` to 1 or more"
            )


def check_distinct(models: Sequence[str]) -> None:
    """Raise KvmeshError(INVALID_ARGUMENT) when two models are served under one name."""
    for name, count in Counter(models).items():
        if count > 1:
            raise invalid(f"{count} of `models` are called {name}: give each a `name` of its own")
