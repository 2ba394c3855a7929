"""A process that has SGLang imported, and forks launchers.

`python -m kvmesh.engine.sglang.forkserver SOCKET HOST ENGINES`: importing SGLang is most of what the start of
an engine costs on a CPU. Here it is done once; every engine after that, a restarted one too, is a fork, and
shares the memory of what was imported with the others. (CUDA does not survive a fork: machines with a GPU do
without.)

SOCKET is a unix socket of packets, each a JSON object. Every caller is greeted with `ready`. Who then sends a
`Launch` and, with it, three descriptors (the link to the worker, stdout, stderr) hears `forked`, with a
descriptor of the process, and in the end `exited`; or `refused`, because SGLang and what it loads read
settings as they are imported, and the caller's are others. Launchers do not depend on this process: when it
dies, they stay.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import setproctitle

from kvmesh.engine.sglang.environment import defaults, keep, on_cpus

# What launchers and schedulers import before they are of any one engine.
_IMPORTS = (
    "kvmesh.engine.sglang.arguments",
    "kvmesh.engine.sglang.layout",
    "kvmesh.engine.sglang.plugins",
    "sglang.srt.disaggregation.nixl.conn",
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.disagg_service",
    "sglang.srt.managers.scheduler",
    # Every model's module.
    "sglang.srt.models.registry",
)
# The names of settings that an import may depend on start with one of these.
_READ_AT_IMPORT = (
    *("ATEN", "CUDA", "DNNL", "GOMP", "HF_", "KMP", "LD_", "MALLOC", "MKL", "NIXL", "NUMEXPR", "NVIDIA"),
    *("OMP", "ONEDNN", "OPENBLAS", "PYTHONPATH", "PYTORCH", "SGL", "TORCH", "TRANSFORMERS", "TRITON", "TVM"),
    *("UCX", "XGRAMMAR"),
)
_DESCRIPTORS = 3
LONGEST_PACKET = 1 << 20


@dataclass(frozen=True, slots=True)
class Launch:
    """The process that is wanted."""

    environment: Mapping[str, str]
    directory: str
    # What `environment.defaults` depend on.
    host: str
    engines: int

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()


class Forkserver:
    """Serves until it is killed. Of one thread: a fork takes no other along."""

    def __init__(self, path: Path) -> None:
        self._settings: dict[str, str] = {}
        # What imports have set, e.g. directories of caches.
        self._set: dict[str, str] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path.unlink(missing_ok=True)
        self._listener.bind(str(path))
        # Callers wait for the greeting while the imports go on.
        self._listener.listen()
        self._wake, self._waker = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        # Callers by the process that they asked for.
        self._callers: dict[int, socket.socket] = {}

    def run(self, host: str, engines: int) -> NoReturn:
        # Before torch is imported, which reads them; the others need it.
        keep(on_cpus(engines))
        keep(defaults(host, engines))
        self._settings = read_at_import(os.environ)
        # Also for the forks' sake, who cannot find their titles' memory once their environment is another.
        setproctitle.setproctitle("sglang::forkserver")
        before = dict(os.environ)
        for module in _IMPORTS:
            importlib.import_module(module)
        self._set = {name: os.environ[name] for name in os.environ.keys() - before.keys()}
        # A collection touches every object, which copies the pages that the forks would share.
        gc.collect()
        gc.freeze()
        for end in (self._wake, self._waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for source in (self._wake, self._listener):
            self._selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                assert isinstance(key.fileobj, socket.socket)
                self._handle(key.fileobj)

    def _handle(self, source: socket.socket) -> None:
        if source is self._wake:
            with contextlib.suppress(BlockingIOError):
                source.recv(4096)
            self._bury()
        elif source is self._listener:
            caller, _ = source.accept()
            caller.setblocking(False)
            self._selector.register(caller, selectors.EVENT_READ)
            _say(caller, event="ready")
        else:
            self._hear(source)

    def _hear(self, caller: socket.socket) -> None:
        packet, descriptors = b"", []
        try:
            packet, descriptors, _, _ = socket.recv_fds(caller, LONGEST_PACKET, _DESCRIPTORS)
            if not packet:
                self._forget(caller)
            elif len(descriptors) == _DESCRIPTORS:
                self._launch(caller, Launch(**json.loads(packet)), descriptors)
        except (OSError, TypeError, ValueError):  # it has gone, or sent something else
            self._forget(caller)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _launch(self, caller: socket.socket, launch: Launch, descriptors: list[int]) -> None:
        wanted = read_at_import({**defaults(launch.host, launch.engines), **launch.environment})
        if wanted != self._settings:
            others = sorted(name for name, _ in wanted.items() ^ self._settings.items())
            _say(caller, event="refused", differ=others)
            return
        pid = os.fork()
        if not pid:
            self._become(launch, descriptors)
        self._callers[pid] = caller
        descriptor = os.pidfd_open(pid)
        try:
            _say(caller, [descriptor], event="forked", pid=pid)
        finally:
            os.close(descriptor)

    def _become(self, launch: Launch, descriptors: list[int]) -> NoReturn:
        """The child's whole life."""
        from kvmesh.engine.sglang.launcher import serve

        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # A terminal's Ctrl-C is for the worker, which drains first.
            os.setsid()
            link, stdout, stderr = descriptors
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            os.close(stdout)
            os.close(stderr)
            for key in list(self._selector.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()
            self._waker.close()
            self._selector.close()
            os.environ.clear()
            os.environ.update({**self._set, **launch.environment})
            os.chdir(launch.directory)
            serve(socket.socket(fileno=link))
        finally:
            os._exit(1)

    def _bury(self) -> None:
        """Tell the callers of the children that have ended."""
        while self._callers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            _say(self._callers.pop(pid), event="exited", code=os.waitstatus_to_exitcode(status))

    def _forget(self, caller: socket.socket) -> None:
        self._selector.unregister(caller)
        caller.close()


def read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    """The settings that have to be those of this process."""
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_IMPORT)}


def _say(caller: socket.socket, descriptors: Sequence[int] = (), **message: Any) -> None:
    # One that is gone, or does not listen, is not waited for.
    with contextlib.suppress(OSError):
        socket.send_fds(caller, [json.dumps(message).encode()], descriptors)


def main() -> None:
    path, host, engines = sys.argv[1:]
    Forkserver(Path(path)).run(host, int(engines))


if __name__ == "__main__":
    main()
