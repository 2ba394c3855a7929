"""The parent of SGLang's scheduler processes: `python -m kvmesh.engine.sglang.launcher FD`, or a fork.

A process of its own, so that the worker neither imports SGLang nor shares its signal handlers, its
bootstrap server's thread or its interpreter lock. It talks to the worker in JSON lines over the
socket FD: reads one EngineSpec, writes `ports`, then `ready`, later `failed`. When the socket closes,
which it does when the worker dies however it dies, everything here ends.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from kvmesh.v1.errors_pb2 import ErrorCode

# The socket to the worker; a forked scheduler must let go of it.
_link: socket.socket | None = None


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """A scheduler's process, spawned or forked."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    if _link is not None:
        _link.close()
    for number in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    run_scheduler_process(*args, **kwargs)


class Launcher:
    """One engine, from its spec to its end."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._lines = link.makefile("r")
        self._directory = ""
        self._load_file = ""
        self._schedulers: list[BaseProcess] = []

    def heed_hang_up(self) -> None:
        """End as soon as the worker hangs up, even in the middle of an import."""
        signal.signal(signal.SIGIO, self._stop_if_left)
        fcntl.fcntl(self._link, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(self._link, fcntl.F_GETFL)
        fcntl.fcntl(self._link, fcntl.F_SETFL, flags | os.O_ASYNC)
        self._stop_if_left()  # it may have before

    def _stop_if_left(self, *_signal: object) -> None:
        try:
            left = not self._link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            left = False
        except OSError:
            left = True
        if left:
            self._stop()

    def tell(self, event: str, **fields: Any) -> None:
        self._link.sendall(json.dumps({"event": event, **fields}).encode() + b"\n")

    def _fail(self, reason: str, code: ErrorCode | None = None) -> None:
        """Tell the worker that this is the end; without a code the engine itself has failed."""
        from kvmesh.v1.errors_pb2 import ErrorCode

        self.tell("failed", reason=reason, code=None if code is None else ErrorCode.Name(code))

    def run(self) -> None:
        line = self._lines.readline()
        if not line:
            return
        # Imported here: it takes seconds, and spawned schedulers import this module too.
        from kvmesh.common.errors import KvmeshError
        from kvmesh.engine.sglang.spec import EngineSpec
        from kvmesh.v1.errors_pb2 import ErrorCode

        spec = EngineSpec(**json.loads(line))
        self._directory = spec.directory
        signal.signal(signal.SIGTERM, self._stop)
        try:
            self._launch(spec)
        except KvmeshError as error:
            self._fail(error.message, error.code)
        except Exception as error:
            fault = self._fault()
            # SGLang refuses arguments that do not fit together before any scheduler runs.
            refused = isinstance(error, ValueError | AssertionError) and not self._schedulers
            code = ErrorCode.ERROR_CODE_INVALID_ARGUMENT if refused else None
            self._fail(fault or f"{type(error).__name__}: {error}", code)
        else:
            self._watch()

    def _launch(self, spec: Any) -> None:
        from kvmesh.engine.sglang.environment import set_environment

        set_environment(spec)
        import setproctitle
        from sglang.srt.entrypoints.engine import Engine, _set_envs_and_config
        from sglang.srt.managers.disagg_service import start_disagg_service
        from sglang.srt.managers.load_snapshot import shm_path_for
        from sglang.srt.plugins import load_plugins
        from sglang.srt.runtime_context import get_device, publish
        from sglang.srt.server_args import PortArgs, ServerArgs
        from sglang.srt.utils import configure_logger

        from kvmesh.engine.sglang.arguments import server_arguments
        from kvmesh.engine.sglang.layout import wire_layout
        from kvmesh.engine.sglang.plugins import check_hooks

        setproctitle.setproctitle(f"sglang::launcher_{spec.worker_id}")
        load_plugins()
        check_hooks()
        wanted = server_arguments(spec)
        bootstrap_port = 0
        if spec.role == "prefill":
            bootstrap_port = _bootstrap_port(spec.host, wanted["disaggregation_bootstrap_port"])
            wanted["disaggregation_bootstrap_port"] = bootstrap_port
        server_args = ServerArgs(**wanted)
        configure_logger(server_args)
        server_args.resolve_once()
        _set_envs_and_config(server_args)
        # SGLang's own handler, just set, would kill this process before it can say why.
        signal.signal(signal.SIGQUIT, self._scheduler_failed)
        server_args.check_server_args()
        publish(server_args, role="tokenizer")
        # SGLang makes its sockets' files in the directory for temporary ones.
        tempfile.tempdir = spec.directory
        ports = PortArgs.init_new(server_args)
        self._load_file = shm_path_for(ports.instance_id)
        self.tell("ports", inputs=ports.scheduler_input_ipc_name, load=self._load_file)
        if get_device().device == "cpu":
            # A forked scheduler has SGLang imported already, which halves the CPU time of a start.
            # (CUDA does not survive a fork.)
            multiprocessing.set_start_method("fork", force=True)
        started, processes = Engine._launch_scheduler_processes(server_args, ports, run_scheduler)
        self._schedulers = list(processes or [])
        # Decode engines find a prefill engine's addresses there, and the scheduler, once it has loaded
        # its model, tells them to it. Its thread must not exist at the fork.
        self._bootstrap_server = start_disagg_service()
        self.tell("schedulers", pids=[process.pid for process in self._schedulers])
        started.wait_for_ready()
        info = started.scheduler_infos[0]["kvmesh"]
        self.tell("ready", info=info | {"bootstrap_port": bootstrap_port}, layout=wire_layout())

    def _watch(self) -> None:
        """Until the worker hangs up or a scheduler ends."""
        ended = wait([self._link, *(process.sentinel for process in self._schedulers)])
        for process in self._schedulers:
            if process.sentinel in ended:
                process.join(1)
                how = f"the scheduler process {_how_it_ended(process.exitcode)}"
                self._fail(self._fault() or how)
                return

    def _scheduler_failed(self, *_signal: object) -> None:
        # A failed scheduler tells its parent by SIGQUIT, and may be kept alive by its own threads.
        self._kill()

    def _fault(self) -> str:
        path = Path(self._directory, "fault")
        return path.read_text() if path.exists() else ""

    def _kill(self) -> None:
        for process in self._schedulers:
            process.kill()

    def _stop(self, *_signal: object) -> NoReturn:
        self.close()
        os._exit(0)

    def close(self) -> None:
        self._kill()
        for process in self._schedulers:
            process.join(5)
        # The worker does this too, unless it was killed.
        if self._load_file:
            Path(self._load_file).unlink(missing_ok=True)
        shutil.rmtree(self._directory, ignore_errors=True)


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    return f"ended with exit code {exitcode}"


def _bootstrap_port(host: str, wanted: int) -> int:
    """A port nothing listens on. Raises KvmeshError where the wanted one is taken."""
    from kvmesh.common.errors import KvmeshError
    from kvmesh.v1.errors_pb2 import ErrorCode

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except OSError as error:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_UNAVAILABLE,
                f"bootstrap port {wanted} on {host} cannot be used ({error.strerror}); "
                "change `worker.bootstrap_port`",
            ) from None
        return probe.getsockname()[1]


def serve(link: socket.socket) -> NoReturn:
    """Launch the engine that the worker at the other end asks for; ends the process with it."""
    global _link
    _link = link
    launcher = Launcher(link)
    try:
        launcher.heed_hang_up()
        launcher.run()
    finally:
        launcher.close()
        # Threads of SGLang's bootstrap server have no way to be stopped.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
