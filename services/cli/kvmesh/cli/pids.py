"""Processes named so that a recycled pid is never mistaken for the one that was meant (Linux)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

# Set, to its home directory, in the environment of everything a supervisor starts; inherited by what
# those start. Not a configuration key: a user may well have KVMESH_HOME in a shell.
MARKER = "KVMESH_SUPERVISED"


class ProcessId(BaseModel):
    """A pid and when its process started, in clock ticks since boot."""

    model_config = ConfigDict(frozen=True)

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """None when there is no such process."""
        started = _started(pid)
        return None if started is None else cls(pid=pid, started=started)

    def alive(self) -> bool:
        """Whether this very process still runs; a zombie does not."""
        return _started(self.pid) == self.started

    def send(self, number: signal.Signals) -> bool:
        """Signal this very process; False when it is gone."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            # The descriptor holds whatever has the pid now; only then is its identity certain.
            if not self.alive():
                return False
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True


def supervised(home: Path) -> list[ProcessId]:
    """Every live process that a supervisor of `home` started, directly or not; never the caller.

    They are known by the marker in their environment, or, as engines overwrite theirs with a title,
    by descending from one that has it.
    """
    wanted = f"{MARKER}={home}".encode()
    processes: dict[int, ProcessId] = {}
    parents: dict[int, int] = {}
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        # The identity first: what is read after it is of this process, or of none that can be signalled.
        if not entry.name.isdigit() or (process := ProcessId.of(int(entry.name))) is None:
            continue
        try:
            parents[process.pid] = int(_fields_after_name(process.pid)[1])
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.add(process.pid)
        except OSError:  # gone, or another user's
            continue
        processes[process.pid] = process
    processes.pop(os.getpid(), None)
    return [
        process
        for pid, process in processes.items()
        if any(ancestor in found for ancestor in _line(pid, parents))
    ]


def _line(pid: int, parents: Mapping[int, int]) -> Iterator[int]:
    """The process and its ancestors."""
    while pid in parents:
        yield pid
        pid = parents[pid]


def end(processes: Iterable[ProcessId], grace_s: float) -> list[ProcessId]:
    """SIGTERM, `grace_s` seconds, SIGKILL. Blocks until all are gone; returns those that had to be killed."""
    remaining = [process for process in processes if process.send(signal.SIGTERM)]
    remaining = wait_gone(remaining, grace_s)
    killed = [process for process in remaining if process.send(signal.SIGKILL)]
    wait_gone(killed, 10.0)
    return killed


def wait_gone(processes: list[ProcessId], timeout_s: float) -> list[ProcessId]:
    """Block until all are gone or `timeout_s` seconds have passed; returns those still alive."""
    deadline = time.monotonic() + timeout_s
    while (
        remaining := [process for process in processes if process.alive()]
    ) and time.monotonic() < deadline:
        time.sleep(0.05)
    return remaining


def _started(pid: int) -> int | None:
    """Clock ticks since boot at which it started; None when the process is gone or a zombie."""
    try:
        fields = _fields_after_name(pid)
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _fields_after_name(pid: int) -> list[str]:
    """/proc/PID/stat from its third field, the state, on (proc(5)): the name before it may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
