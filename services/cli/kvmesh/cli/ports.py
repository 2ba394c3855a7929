"""The ports a mesh listens on: which are taken, and free ones where the configuration says 0."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from kvmesh.common.config import Config
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.errors_pb2 import ErrorCode

_LOWEST = 10_000
# Linux's default; outgoing connections take their ports from here up.
_EPHEMERAL = 32_768
# What this process gave away: nobody may listen there yet.
_given: set[int] = set()


class ConfiguredPort(NamedTuple):
    host: str
    port: int
    # Section and field, as in the file.
    section: str
    field: str

    @property
    def key(self) -> str:
        return f"{self.section}.{self.field}"


def configured(config: Config) -> Iterator[ConfiguredPort]:
    """Every port the processes of `kvmesh up` will listen on, workers' excepted."""
    fields = {"frontend": ("http_port", "port", "metrics_port"), "router": ("port", "metrics_port")}
    if config.kvbm.enabled:
        fields["kvbm"] = ("port", "metrics_port")
    if not config.nats.url:
        fields["nats"] = ("port",)
    for section, names in fields.items():
        values = getattr(config, section)
        for name in names:
            yield ConfiguredPort(values.host, getattr(values, name), section, name)


def check(config: Config) -> None:
    """Raise KvmeshError(UNAVAILABLE) naming every port that cannot be had, who has it, the key to change."""
    problems = []
    seen: dict[int, str] = {}
    for port in configured(config):
        if not port.port:
            continue
        if port.port in seen:
            problems.append(f"port {port.port} is both `{seen[port.port]}` and `{port.key}`: change one")
            continue
        seen[port.port] = port.key
        if reason := _unusable(port):
            variable = f"KVMESH_{port.section.upper()}__{port.field.upper()}"
            problems.append(f"{reason}; set `{port.key}` (or {variable}) to another one")
    if problems:
        raise KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, "\n".join(problems))


def assign(config: Config) -> Config:
    """The same configuration with a free port wherever it says 0."""
    changed: dict[str, dict[str, int]] = {}
    for port in configured(config):
        if not port.port:
            changed.setdefault(port.section, {})[port.field] = free_port(port.host)
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=fields) for name, fields in changed.items()}
    )


def free_port(host: str) -> int:
    """A port nobody listens on and no outgoing connection will be given, so that a restart finds it free."""
    highest = _ephemeral_start()
    for _attempt in range(1000):
        port = random.randrange(_LOWEST, highest)
        if port not in _given and _bindable(host, port) is None:
            _given.add(port)
            return port
    raise KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, f"found no free port on {host}")


def _ephemeral_start() -> int:
    try:
        start = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        return _EPHEMERAL
    return start if start > _LOWEST + 1000 else _EPHEMERAL


def _unusable(port: ConfiguredPort) -> str:
    error = _bindable(port.host, port.port)
    if error is None:
        return ""
    if isinstance(error, PermissionError):
        return f"port {port.port} needs privileges"
    if isinstance(error, socket.gaierror):
        return f"host {port.host} of port {port.port} is unknown"
    owner = _owner(port.port)
    return f"port {port.port} is taken{f' by {owner}' if owner else ''}"


def _bindable(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return error
    return None


def _owner(port: int) -> str:
    """Name and pid of who listens; empty when that may not be known."""
    try:
        for connection in psutil.net_connections("tcp"):
            local = connection.laddr
            if connection.status == psutil.CONN_LISTEN and local and local.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.Error, OSError):
        return ""
    return ""
