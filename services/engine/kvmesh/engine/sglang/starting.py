"""How a worker comes by its engine's launcher: forked where a forkserver runs, else a program of its own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import sys
from abc import ABC, abstractmethod
from typing import Any

import structlog

from kvmesh.engine.sglang.forkserver import LONGEST_PACKET, Launch
from kvmesh.engine.sglang.spec import EngineSpec

log = structlog.get_logger()

# A forkserver that was started together with the worker listens by then; importing SGLang takes longer.
_LISTENS_WITHIN_S = 8.0
_ASK_AGAIN_S = 0.1


class Launcher(ABC):
    """A launcher's process."""

    pid: int

    @abstractmethod
    async def wait(self) -> int | None:
        """Its exit code once it has ended; None where nobody can tell."""

    @abstractmethod
    def kill(self) -> None:
        """End it now; nothing where it has ended."""


async def start_launcher(link: socket.socket, spec: EngineSpec) -> Launcher:
    """The process that the worker's `link` leads to; it has its own copy of the descriptor."""
    if spec.forkserver:
        forked = await _fork(link, spec)
        if isinstance(forked, Launcher):
            return forked
        log.info("the engine imports SGLang itself", reason=forked)
    return await _Spawned.start(link)


class _Spawned(Launcher):
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, link: socket.socket) -> _Spawned:
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                # SGLang warns of every kind of device this machine does not have.
                "-Wignore::UserWarning",
                "-m",
                "kvmesh.engine.sglang.launcher",
                str(link.fileno()),
                pass_fds=[link.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                # A terminal's Ctrl-C is for the worker, which drains first.
                start_new_session=True,
            )
        )

    async def wait(self) -> int | None:
        return await self._process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


class _Forked(Launcher):
    """Not a child of the worker: the forkserver tells of its end or, if that is gone, its descriptor does."""

    def __init__(self, pid: int, descriptor: int, forkserver: socket.socket) -> None:
        self.pid = pid
        self._descriptor = descriptor
        self._ended = asyncio.create_task(self._until_ended(forkserver))

    async def wait(self) -> int | None:
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        if not self._ended.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    async def _until_ended(self, forkserver: socket.socket) -> int | None:
        try:
            with forkserver:
                message, _ = await _hear(forkserver)
            return message["code"]
        except OSError:
            await _readable(self._descriptor)
            return None
        finally:
            os.close(self._descriptor)


async def _fork(link: socket.socket, spec: EngineSpec) -> _Forked | str:
    """Or why not."""
    forkserver = await _connect(spec.forkserver)
    if forkserver is None:
        return f"no forkserver listens at {spec.forkserver}"
    launch = Launch(dict(os.environ), os.getcwd(), spec.host, spec.engines)
    with contextlib.ExitStack() as undone:
        undone.enter_context(forkserver)
        try:
            # It comes when SGLang is imported, which takes as long here as there.
            await _hear(forkserver)
            socket.send_fds(forkserver, [launch.encode()], [link.fileno(), 1, 2])
            answer, descriptors = await _hear(forkserver)
        except OSError as error:
            return f"the forkserver does not answer: {error.strerror}"
        if not descriptors:
            return f"the forkserver has other settings of {', '.join(answer['differ'])}"
        undone.pop_all()
    return _Forked(answer["pid"], descriptors[0], forkserver)


async def _connect(path: str) -> socket.socket | None:
    deadline = asyncio.get_running_loop().time() + _LISTENS_WITHIN_S
    while True:
        forkserver = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        forkserver.setblocking(False)
        try:
            forkserver.connect(path)
        except OSError:
            forkserver.close()
        else:
            return forkserver
        if asyncio.get_running_loop().time() > deadline:
            return None
        await asyncio.sleep(_ASK_AGAIN_S)


async def _hear(forkserver: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next message and the descriptors that came with it. Raises OSError when the forkserver has gone."""
    await _readable(forkserver.fileno())
    packet, descriptors, _, _ = socket.recv_fds(forkserver, LONGEST_PACKET, 1)
    if not packet:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    return json.loads(packet), descriptors


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(descriptor, lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
