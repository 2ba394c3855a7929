"""`kvmesh up`: checks, the model, the supervisor, then a first answer as soon as all is ready."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape

from kvmesh.cli import logfile, ports
from kvmesh.cli.display import Display
from kvmesh.cli.endpoint import Answer, curl, stream_chat
from kvmesh.cli.home import Home, MeshState, MeshStatus
from kvmesh.cli.pids import MARKER, ProcessId, end, supervised, wait_gone
from kvmesh.cli.plan import has_gpu
from kvmesh.cli.settings import check_distinct, check_workers, endpoint_url, load
from kvmesh.cli.supervisor import already_running, first_status, supervise
from kvmesh.common.config import Config, is_loopback
from kvmesh.common.errors import KvmeshError
from kvmesh.common.served import ModelConfig
from kvmesh.engine.model import resolve_model
from kvmesh.v1.errors_pb2 import ErrorCode

_Model = TypeVar("_Model", bound=ModelConfig)

_QUESTION = "What is the capital of France?"


def up(config_file: Path | None, overrides: dict[str, Any], *, detach: bool, console: Console) -> None:
    """Start a mesh. In the foreground returns when it has ended; detached, once it serves.

    Raises KvmeshError when it cannot be started; then nothing is left running.
    """
    config = _configure(config_file, overrides)
    home = Home(config.home)
    home.create()
    lock = home.lock()
    if lock is None:
        _join(home, config, detach=detach, console=console)
        return
    try:
        config, model = _prepare(config, home, console)
        url = endpoint_url(config)
        if detach:
            supervisor = _start_supervisor(home, lock, model, url)
        else:
            _foreground(home, first_status(model, url), console)
            return
    finally:
        os.close(lock)  # a supervisor in the background holds its own copy
    _wait_and_greet(home, supervisor, console)


def _configure(config_file: Path | None, overrides: dict[str, Any]) -> Config:
    config = load(config_file, overrides)
    check_workers(config)
    return config.model_copy(
        update={
            "home": config.home.expanduser().resolve(),
            "cache_dir": config.cache_dir.expanduser().resolve(),
            "model": _placed(config.model),
            "models": [_placed(model) for model in config.models],
            "tls": config.tls.whole_paths(),
            "nats": config.nats.model_copy(update={"tls": config.nats.tls.whole_paths()}),
        }
    )


def _placed(model: _Model) -> _Model:
    """The same, with a whole path: processes must not depend on where they were started."""
    directory = Path(model.id).expanduser()
    return model.model_copy(update={"id": str(directory.resolve())}) if directory.is_dir() else model


def _prepare(config: Config, home: Home, console: Console) -> tuple[Config, str]:
    """Everything that can go wrong before a process is started."""
    home.clear_status()
    if strays := supervised(home.root):
        console.print(f"ending {len(strays)} processes left by a mesh whose supervisor died")
        end(strays, 5.0)
    ports.check(config)
    config = ports.assign(config)
    with console.status("looking for the model") as status:

        def tell(what: str, part: float) -> None:
            status.update(f"preparing the default model: {what} ({part:.0%})")

        models = [resolve_model(served, tell).name for served in config.served()]
    check_distinct(models)
    home.write_config(config)
    if config.tenants.keys == "off" and not is_loopback(config.frontend.host):
        console.print(
            f"[yellow]warning:[/] whoever reaches {escape(config.frontend.host)}:{config.frontend.http_port} "
            "may use this mesh: no API keys are asked for; set `tenants.keys` to `required`\n",
            soft_wrap=True,
        )
    engines = sorted({served.engine.kind for served in config.served()})
    where = (" on GPU" if has_gpu() else " on CPU") if "sglang" in engines else ""
    names = ", ".join(models)
    console.print(f"[bold]kvmesh[/]  {escape(names)}, engine {' and '.join(engines)}{where}\n")
    return config, names


def _join(home: Home, wanted: Config, *, detach: bool, console: Console) -> None:
    """Somebody runs a mesh here already: fine when it is the one that is wanted, in the background."""
    owner, status = home.owner(), home.read_status()
    if not detach or owner is None or status is None or status.supervisor != owner:
        raise already_running(home)
    running = home.read_config()
    # Where any port was welcome, the one that was chosen is.
    chosen = {(p.section, p.field): p.port for p in ports.configured(running)}
    wishes, facts = wanted.model_dump(mode="json"), running.model_dump(mode="json")
    for port in ports.configured(wanted):
        if not port.port:
            wishes[port.section][port.field] = chosen.get((port.section, port.field))
    if wishes != facts:
        different = sorted(key for key in wishes if wishes[key] != facts.get(key))
        raise KvmeshError(
            ErrorCode.ERROR_CODE_UNAVAILABLE,
            f"a mesh with another configuration is running in {home.root} (it differs in "
            f"{', '.join(f'`{key}`' for key in different)}): stop it with `kvmesh down` first",
        )
    console.print("already running\n")
    _wait_and_greet(home, owner, console)


def _start_supervisor(home: Home, lock: int, model: str, url: str) -> ProcessId:
    # It writes only when it dies of a fault, so what is there is of an earlier one.
    with home.log("supervisor").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvmesh.cli.supervisor", str(home.root), str(lock), model, url],
            env=os.environ | {MARKER: str(home.root)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
    supervisor = ProcessId.of(process.pid)
    if supervisor is None:
        raise _supervisor_ended(home)
    home.hand_over(lock, supervisor)
    return supervisor


def _supervisor_ended(home: Home) -> KvmeshError:
    """Why it ended without a word in its status: asked to, or by a fault it has left a trace of."""
    log = home.log("supervisor")
    if not (lines := logfile.tail(log, 10)):
        return KvmeshError(ErrorCode.ERROR_CODE_CANCELLED, "the mesh was stopped before it was ready")
    trace = "\n".join(f"  {line}" for line in lines)
    return KvmeshError(ErrorCode.ERROR_CODE_INTERNAL, f"the supervisor died\n{trace}\nits log: {log}")


def _wait_and_greet(home: Home, supervisor: ProcessId, console: Console) -> None:
    started = time.monotonic()
    try:
        with Display(console) as display:
            status = _wait_ready(home, supervisor, display)
    except KeyboardInterrupt:
        console.print("\nstopping")
        supervisor.send(SIGTERM)
        wait_gone([supervisor], 60.0)
        raise
    console.print(f"ready after {time.monotonic() - started:.1f} s\n")
    config = home.read_config()
    if not _greets(config):
        _print_first_steps(console, status, config)
        return
    console.print(f"[bold]>[/] {_QUESTION}")
    answer = Answer()
    try:
        for piece in _first_chat(status.url, answer, config):
            console.out(piece, end="", highlight=False)
    except KvmeshError as error:
        raise KvmeshError(
            error.code,
            f"the mesh runs, but its first chat failed: {error.message}; `kvmesh logs` may say why, "
            "`kvmesh down` stops it",
        ) from None
    console.out("")
    _print_hints(console, status, answer)


def _wait_ready(home: Home, supervisor: ProcessId, display: Display) -> MeshStatus:
    while True:
        alive = supervisor.alive()
        status = home.read_status()
        if status is not None and status.supervisor == supervisor:
            display.update(status)
            if status.state is MeshState.READY:
                return status
            if status.state is MeshState.FAILED and not alive:
                raise KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, status.error)
        if not alive:
            raise _supervisor_ended(home)
        time.sleep(0.1)


def _first_chat(url: str, answer: Answer, config: Config) -> Iterator[str]:
    message = {"role": "user", "content": _QUESTION}
    certificate = config.frontend.tls.cert
    return stream_chat(url, [message], answer, certificate=certificate, temperature=0, max_tokens=64)


def _greets(config: Config) -> bool:
    """Whether there is somebody to chat with, and a first chat needs neither a key nor a certificate."""
    if all(served.model.task == "embed" for served in config.served()):
        return False
    return config.tenants.keys == "off" and not config.frontend.tls.client_ca


def _print_hints(console: Console, status: MeshStatus, answer: Answer) -> None:
    console.print(f"[dim]{escape(answer.summary())}[/]\n")
    console.print("Ask it something:\n")
    # Whole on one line, however narrow the terminal: it is there to be copied.
    console.out(f"  {curl(status.url, _QUESTION)}", highlight=False)
    console.print(
        "\n  ./kvmesh chat     ./kvmesh status     ./kvmesh logs -f     ./kvmesh down\n", highlight=False
    )


def _print_first_steps(console: Console, status: MeshStatus, config: Config) -> None:
    """Instead of a first chat."""
    console.print(f"[bold]{escape(status.url)}[/]", highlight=False)
    if config.frontend.tls.client_ca:
        console.print(f"It asks for client certificates of {escape(config.frontend.tls.client_ca)}.")
    if config.tenants.keys == "required":
        console.print(
            "It asks for API keys; make one, then talk:\n\n"
            "  export KVMESH_API_KEY=$(./kvmesh keys create --tenant me)\n  ./kvmesh chat\n",
            highlight=False,
        )


def _foreground(home: Home, status: MeshStatus, console: Console) -> None:
    ended = asyncio.run(_supervise_in_view(home, status, console))
    if ended.state is MeshState.FAILED:
        raise KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, ended.error)
    console.print("stopped")


async def _supervise_in_view(home: Home, status: MeshStatus, console: Console) -> MeshStatus:
    ready = asyncio.Event()

    def observe(changed: MeshStatus) -> None:
        display.update(changed)
        if changed.state is MeshState.READY:
            ready.set()

    async def greet() -> None:
        await ready.wait()
        config = home.read_config()
        if not _greets(config):
            _print_first_steps(console, status, config)
            return
        answer = Answer()

        def ask() -> None:
            for _piece in _first_chat(status.url, answer, config):
                pass

        try:
            await asyncio.to_thread(ask)
        except KvmeshError as error:
            console.print(f"[red]the first chat failed:[/] {escape(error.message)}\n")
            return
        console.print(f"[bold]>[/] {_QUESTION}\n{escape(answer.text)}")
        _print_hints(console, status, answer)
        console.print("[dim]Ctrl-C stops the mesh once live requests have ended, a second one at once.[/]\n")

    with Display(console) as display:
        greeting = asyncio.create_task(greet())
        try:
            return await supervise(home, status, observe)
        finally:
            greeting.cancel()
