"""The process that owns a mesh: starts its processes, restarts those that die, stops them in order.

Runs inside `kvmesh up`, or in the background as `python -m kvmesh.cli.supervisor HOME`. Everything it
knows is in the home's status file.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from kvmesh.cli import logfile
from kvmesh.cli.home import Home, MeshState, MeshStatus, ProcessState
from kvmesh.cli.pids import ProcessId
from kvmesh.cli.plan import plan
from kvmesh.cli.process import ProcessSpec, SupervisedProcess
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.errors_pb2 import ErrorCode

# While the mesh starts for the first time, a process that dies this often will not come up at all.
_STARTS = 3
_CAP_LOGS_EVERY_S = 10.0
_TAIL_LINES = 15


class Supervisor:
    """Runs `specs` until told to stop. Belongs to one event loop; the caller holds the home's lock."""

    def __init__(
        self,
        home: Home,
        specs: Sequence[ProcessSpec],
        status: MeshStatus,
        observe: Callable[[MeshStatus], None] = lambda _status: None,
    ) -> None:
        self.status = status
        self._home = home
        self._observe = observe
        self._processes = [SupervisedProcess(spec, home, self._changed) for spec in specs]
        status.processes = [process.status for process in self._processes]
        self._stopping = asyncio.Event()
        self._killed = False

    async def run(self) -> MeshStatus:
        """Returns once every process has ended: after `stop`, or when the mesh could not be started."""
        by_name = {process.spec.name: process for process in self._processes}
        running = {
            process: asyncio.create_task(process.run(by_name.get(process.spec.after)))
            for process in self._processes
        }
        asked = asyncio.create_task(self._stopping.wait())
        capping = asyncio.create_task(self._cap_logs())
        try:
            # The others end only after a stop, or by a fault in here, which the gathering below raises.
            await asyncio.wait([asked, capping, *running.values()], return_when=asyncio.FIRST_COMPLETED)
            for stage in sorted({process.spec.stage for process in self._processes}):
                await self._stop_stage([p for p in self._processes if p.spec.stage == stage], running)
        finally:
            asked.cancel()
            capping.cancel()
            for process in self._processes:
                process.kill()
            await asyncio.gather(*running.values())
        return self.status

    def stop(self) -> None:
        """End the mesh in order; a second call ends it at once."""
        if self._stopping.is_set():
            self._killed = True
            for process in self._processes:
                process.kill()
            return
        if self.status.state is not MeshState.FAILED:
            self.status.state = MeshState.STOPPING
        self._stopping.set()
        self._changed()

    async def _stop_stage(
        self, processes: list[SupervisedProcess], running: dict[SupervisedProcess, asyncio.Task[None]]
    ) -> None:
        for process in processes:
            process.stop()
        # A mesh that never started has no requests to wait for.
        failed = self.status.state is MeshState.FAILED
        grace = 2.0 if failed else max(process.spec.grace_s for process in processes)
        await asyncio.wait([running[process] for process in processes], timeout=0 if self._killed else grace)
        for process in processes:
            process.kill()
        await asyncio.wait([running[process] for process in processes])

    def _changed(self) -> None:
        status = self.status
        states = [process.status.state for process in self._processes]
        if status.state is MeshState.STARTING:
            for process in self._processes:
                if process.status.restarts >= _STARTS:
                    self._fail(process)
                    break
            else:
                if all(state is ProcessState.READY for state in states):
                    status.state = MeshState.READY
        elif status.state in (MeshState.READY, MeshState.DEGRADED):
            healthy = all(state is ProcessState.READY for state in states)
            status.state = MeshState.READY if healthy else MeshState.DEGRADED
        self._home.write_status(status)
        self._observe(status)

    def _fail(self, process: SupervisedProcess) -> None:
        # The last line is part of the reason.
        lines = [logfile.message(line) for line in process.log_tail(_TAIL_LINES)[:-1]]
        self.status.state = MeshState.FAILED
        self.status.error = "\n".join(
            [f"{process.spec.name} does not start: {process.status.last_exit}"]
            + [f"  {line}" for line in lines]
            + [f"its log: {process.status.log}"]
        )
        self._stopping.set()

    async def _cap_logs(self) -> None:
        while True:
            await asyncio.sleep(_CAP_LOGS_EVERY_S)
            for process in self._processes:
                logfile.cap(self._home.log(process.spec.name))


async def supervise(
    home: Home, status: MeshStatus, observe: Callable[[MeshStatus], None] = lambda _status: None
) -> MeshStatus:
    """Run the mesh of `home` until a signal: the first drains, the second kills. The caller has the lock."""
    supervisor = Supervisor(home, plan(home.read_config(), home), status, observe)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, supervisor.stop)
    try:
        ended = await supervisor.run()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)
    # What is left after a failure tells whoever started it, or asks later, why.
    if ended.state is not MeshState.FAILED:
        home.clear_status()
    return ended


def first_status(model: str, url: str) -> MeshStatus:
    """The status of a mesh whose supervisor is the calling process."""
    own = ProcessId.of(os.getpid())
    assert own is not None
    return MeshStatus(
        supervisor=own, started_at=time.time(), version=version("kvmesh-cli"), model=model, url=url
    )


def already_running(home: Home) -> KvmeshError:
    status = home.read_status()
    pid = f" (supervisor pid {status.supervisor.pid})" if status else ""
    return KvmeshError(
        ErrorCode.ERROR_CODE_UNAVAILABLE,
        f"a mesh is already running in {home.root}{pid}: `kvmesh status` shows it, `kvmesh down` stops it; "
        "KVMESH_HOME and other ports make room for a second one",
    )


def main() -> None:
    """`python -m kvmesh.cli.supervisor HOME LOCK MODEL URL`; LOCK is an inherited, locked descriptor."""
    root, descriptor, model, url = sys.argv[1:]
    home = Home(Path(root))
    os.set_inheritable(int(descriptor), False)
    ended = asyncio.run(supervise(home, first_status(model, url)))
    sys.exit(1 if ended.state is MeshState.FAILED else 0)


if __name__ == "__main__":
    main()
