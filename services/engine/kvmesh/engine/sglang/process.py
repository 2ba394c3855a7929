"""The engine's processes, seen from the worker: starts the launcher, hears from it, ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable
from dataclasses import asdict
from typing import Any, TypeVar

from kvmesh.common.errors import TABLE, KvmeshError
from kvmesh.engine.sglang.spec import EngineSpec
from kvmesh.engine.sglang.starting import Launcher, start_launcher
from kvmesh.v1.errors_pb2 import ErrorCode

# The layouts of SGLang's messages come in one line.
_LONGEST_LINE = 1 << 20
_STOP_S = 10.0
_T = TypeVar("_T")
_CODES = {ErrorCode.Name(code): code for code in TABLE}


class EngineProcess:
    """SGLang's launcher and, through it, the schedulers. Nothing of it outlives this process."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._launcher: Launcher | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._listening: asyncio.Task[None] | None = None
        self._events: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._closing = False
        # Set once, when the processes have ended or cannot go on.
        self.failure: asyncio.Future[KvmeshError] = asyncio.get_running_loop().create_future()
        self.scheduler_pids: list[int] = []

    async def start(self) -> None:
        """Start the launcher and send the spec. Waits where a forkserver is still importing SGLang."""
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as undone:
            undone.enter_context(ours)
            with theirs:
                self._launcher = await start_launcher(theirs, self._spec)
            undone.pop_all()
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=_LONGEST_LINE)
        self._writer.write(json.dumps(asdict(self._spec)).encode() + b"\n")
        self._listening = asyncio.create_task(self._listen(reader))

    async def event(self, name: str) -> dict[str, Any]:
        """Wait for the launcher to say `name`. Raises the failure if that comes first."""
        return await self.unless_failed(
            self._events.setdefault(name, asyncio.get_running_loop().create_future())
        )

    async def unless_failed(self, work: Awaitable[_T]) -> _T:
        """What `work` gives. Raises the failure if that comes first."""
        future = asyncio.ensure_future(work)
        await asyncio.wait([future, self.failure], return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        future.cancel()
        raise self.failure.result()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            name = message.pop("event")
            if name == "failed":
                self._fail(message["reason"], message["code"])
            elif name == "schedulers":
                self.scheduler_pids = message["pids"]
            else:
                future = self._events.setdefault(name, asyncio.get_running_loop().create_future())
                future.set_result(message)
        assert self._launcher is not None
        code = await self._launcher.wait()
        how = "" if code is None else f" with exit code {code}"
        self._fail(f"its launcher ended{how}; see the log above")

    def _fail(self, reason: str, code: str | None = None) -> None:
        if not self.failure.done() and not self._closing:
            if code is None:
                error = KvmeshError(ErrorCode.ERROR_CODE_ENGINE_FAILED, f"the sglang engine failed: {reason}")
            else:
                error = KvmeshError(_CODES[code], reason)
            self.failure.set_result(error)

    async def close(self) -> None:
        """End all processes and wait for it; idempotent."""
        self._closing = True
        if self._writer is not None:
            # The launcher takes the closed socket for its order to stop.
            self._writer.close()
        if self._launcher is not None:
            try:
                await asyncio.wait_for(self._launcher.wait(), _STOP_S)
            except TimeoutError:
                self._launcher.kill()
                await self._launcher.wait()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
