"""The configuration as the command reads it, and what follows from it before anything runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvmesh.cli.home import Home
from kvmesh.common.config import Config, load_config
from kvmesh.common.errors import KvmeshError, invalid


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


def parse_alias(text: str) -> tuple[str, str]:
    """NAME=MODEL as both. Raises KvmeshError(INVALID_ARGUMENT)."""
    name, _, model = text.partition("=")
    if not name or not model:
        raise invalid(f"--alias {text}: write NAME=MODEL, e.g. gpt-4o=default")
    return name, model


def endpoint_url(config: Config) -> str:
    host = config.frontend.host
    local = host in ("0.0.0.0", "127.0.0.1", "::", "::1", "")
    scheme = "https" if config.frontend.tls.cert else "http"
    return f"{scheme}://{'localhost' if local else host}:{config.frontend.http_port}"


def worker_names(config: Config) -> list[str]:
    counts = config.workers
    return [
        f"{role}-{index}"
        for role, count in (
            ("prefill", counts.prefill),
            ("decode", counts.decode),
            ("aggregated", counts.aggregated),
        )
        for index in range(count)
    ]


def check_workers(config: Config) -> None:
    """Raise KvmeshError(INVALID_ARGUMENT) when the workers could not serve anything."""
    counts = config.workers
    if not worker_names(config):
        raise invalid("no workers: set `workers.prefill` and `workers.decode`, or `workers.aggregated`")
    if bool(counts.prefill) != bool(counts.decode) and not counts.aggregated:
        missing = "decode" if counts.prefill else "prefill"
        raise invalid(f"prefill and decode workers work in pairs: set `workers.{missing}` to 1 or more")
