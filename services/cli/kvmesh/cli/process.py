"""One supervised process: started, asked whether it is ready, restarted when it dies, stopped.

It leads a session of its own, so that a terminal's Ctrl-C reaches the supervisor only and its whole
group can be killed, and the kernel kills it when the supervisor dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvmesh.cli import leash, logfile
from kvmesh.cli.backoff import Backoff
from kvmesh.cli.home import Home, ProcessState, ProcessStatus
from kvmesh.cli.pids import ProcessId
from kvmesh.cli.probes import MakeProbe
from kvmesh.common.tls import WatchedFiles

# Seconds between questions while a process starts, and afterwards.
_ASK_STARTING_S = 0.2
_ASK_RUNNING_S = 2.0
_REASON_CHARS = 400


@dataclass(frozen=True)
class ProcessSpec:
    """What to run and how to know that it is ready."""

    name: str
    role: str
    command: Sequence[str]
    # All of it: nothing is inherited.
    environment: Mapping[str, str]
    probe: MakeProbe
    address: str = ""
    # Seconds from SIGTERM to SIGKILL.
    grace_s: float = 10.0
    # Processes stop in the order of their stages.
    stage: int = 0
    # Files that it reads again at a SIGHUP, which it gets when they change.
    rereads: Sequence[str] = ()
    # Name of a process that must have been ready once before this one is first started.
    after: str = ""


class SupervisedProcess:
    """Keeps one spec running from `run` to `stop`. Belongs to one event loop."""

    def __init__(self, spec: ProcessSpec, home: Home, changed: Callable[[], None]) -> None:
        self.spec = spec
        self.status = ProcessStatus(
            name=spec.name,
            role=spec.role,
            since=time.time(),
            address=spec.address,
            log=str(home.log(spec.name)),
        )
        self._log = home.log(spec.name)
        self._changed = changed
        self._was_ready = asyncio.Event()
        self._backoff = Backoff()
        self._stop = asyncio.Event()
        self._popen: subprocess.Popen[bytes] | None = None

    def log_tail(self, lines: int) -> list[str]:
        """What the process wrote last since its latest start."""
        return logfile.tail(self._log, lines, self.status.log_start)

    async def run(self, predecessor: SupervisedProcess | None = None) -> None:
        """Start the process, again whenever it dies, until `stop`. Cancelling kills it.

        The first start waits until the predecessor has been ready.
        """
        if predecessor is not None:
            await self._unless_stopped(predecessor._was_ready)
        while not self._stop.is_set():
            logfile.cap(self._log)
            reason = await self._run_once()
            if self._stop.is_set():
                break
            delay_s = self._backoff.delay_s(self._healthy_s())
            self._died(reason)
            if await self._stopped_within(delay_s):
                break
        self.status.process = None
        self._enter(ProcessState.STOPPED)

    async def _run_once(self) -> str:
        """From start to exit; says why it ended."""
        exited = self._spawn()
        asking = asyncio.create_task(self._ask())
        try:
            code = await exited
        finally:
            asking.cancel()
            self._reap()
        return _reason(code, self.log_tail(1))

    def stop(self) -> None:
        """Ask the process to end; `run` returns once it has. Restarts cease at once."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._popen is not None:
            self._enter(ProcessState.STOPPING)
            # Not Popen.send_signal: it may bury a zombie that `_exit_of` has yet to look at.
            os.kill(self._popen.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End the process and all it has started, now."""
        self._stop.set()
        if self._popen is not None:
            _kill_group(self._popen.pid)

    def _spawn(self) -> asyncio.Future[int]:
        """Start the process; the future gives its wait status, unreaped."""
        with self._log.open("ab") as log:
            self.status.log_start = log.tell()
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *self.spec.command],
                env=self.spec.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.status.process = ProcessId.of(self._popen.pid)
        self.status.ready_after_s = None
        self._enter(ProcessState.STARTING)
        return _exit_of(self._popen.pid)

    def _reap(self) -> None:
        """Kill the rest of the group while the zombie keeps its id from being reused; then bury it."""
        assert self._popen is not None
        _kill_group(self._popen.pid)
        self._popen.wait()
        self._popen = None

    async def _ask(self) -> None:
        started = time.monotonic()
        probe = self.spec.probe()
        files = WatchedFiles(self.spec.rereads)
        try:
            while True:
                if files.changed() and self._popen is not None:
                    os.kill(self._popen.pid, signal.SIGHUP)
                ready = await probe.ready()
                if not self._stop.is_set():
                    if ready and self.status.state is not ProcessState.READY:
                        if self.status.ready_after_s is None:
                            self.status.ready_after_s = time.monotonic() - started
                        self._was_ready.set()
                        self._enter(ProcessState.READY)
                    elif not ready and self.status.state is ProcessState.READY:
                        self._enter(ProcessState.UNREADY)
                starting = self.status.state is ProcessState.STARTING
                await asyncio.sleep(_ASK_STARTING_S if starting else _ASK_RUNNING_S)
        finally:
            await probe.close()

    def _healthy_s(self) -> float:
        return time.time() - self.status.since if self.status.state is ProcessState.READY else 0.0

    def _died(self, reason: str) -> None:
        self.status.process = None
        self.status.restarts += 1
        self.status.last_exit = reason
        self.status.last_exit_at = time.time()
        self._enter(ProcessState.RESTARTING)

    async def _unless_stopped(self, event: asyncio.Event) -> None:
        """Wait for the event, or for a stop."""
        waits = [asyncio.create_task(event.wait()), asyncio.create_task(self._stop.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            return False
        return True

    def _enter(self, state: ProcessState) -> None:
        if state is not self.status.state:
            self.status.state = state
            self.status.since = time.time()
        self._changed()


def _exit_of(pid: int) -> asyncio.Future[int]:
    """The exit of an own child as subprocess counts it (negative: the signal); leaves it a zombie."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[int] = loop.create_future()
    descriptor = os.pidfd_open(pid)

    def exited() -> None:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert result is not None
        code = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        if not future.done():
            future.set_result(code)

    def forget(_future: asyncio.Future[int]) -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)

    loop.add_reader(descriptor, exited)
    future.add_done_callback(forget)
    return future


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(pid, signal.SIGKILL)


def _reason(code: int, last_lines: list[str]) -> str:
    if code < 0:
        what = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            what += " (by hand, or for want of memory)"
    else:
        what = f"exited with status {code}"
    # Who is killed from outside has not said why.
    if code in (-signal.SIGKILL, -signal.SIGTERM) or not last_lines:
        return what
    return f"{what}: {logfile.message(last_lines[-1]).strip()[:_REASON_CHARS]}"
