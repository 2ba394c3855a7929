"""The state directory of one mesh: who supervises it, how its processes fare, their logs.

One supervisor owns a home for as long as it holds the lock; it alone writes the state. Readers may
come at any time: every write replaces the file whole.
"""

from __future__ import annotations

import fcntl
import os
from enum import StrEnum
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from kvmesh.cli.pids import ProcessId
from kvmesh.common.config import Config, load_config
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.errors_pb2 import ErrorCode


class ProcessState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    # Runs, was ready, and says that it is not now.
    UNREADY = "unready"
    # Died; waits for its restart.
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"


class MeshState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    # Was ready; a process is not now.
    DEGRADED = "degraded"
    STOPPING = "stopping"
    # Could not be started; `error` says why.
    FAILED = "failed"


class ProcessStatus(BaseModel):
    """One supervised process. Times are seconds since the epoch."""

    name: str
    role: str
    state: ProcessState = ProcessState.STARTING
    # When it entered the state.
    since: float
    process: ProcessId | None = None
    # host:port of its main server, and the service that answers there.
    address: str = ""
    restarts: int = 0
    last_exit: str = ""
    last_exit_at: float | None = None
    # How long the current process took to become ready.
    ready_after_s: float | None = None
    log: str
    # Where in the log the current process began.
    log_start: int = 0


class MeshStatus(BaseModel):
    """What the supervisor says of itself and its processes."""

    supervisor: ProcessId
    state: MeshState = MeshState.STARTING
    error: str = ""
    started_at: float
    version: str
    model: str
    url: str
    processes: list[ProcessStatus] = []


class Home:
    """Paths inside the state directory, and its two files: the lock and the status."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self.logs = self.root / "logs"
        self.config_file = self.root / "config.yaml"
        self._status_file = self.root / "status.json"
        self._lock_file = self.root / "lock"

    def create(self) -> None:
        """Raises KvmeshError when the directory cannot be made."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_INVALID_ARGUMENT,
                f"cannot create {self.logs}: {error.strerror}; set `home` (KVMESH_HOME) to another directory",
            ) from None

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def lock(self) -> int | None:
        """Become the owner; None when somebody else is. The lock lives as long as the descriptor is open."""
        descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        own = ProcessId.of(os.getpid())
        assert own is not None
        self.hand_over(descriptor, own)
        return descriptor

    def hand_over(self, descriptor: int, owner: ProcessId) -> None:
        """Name the process that holds the lock from now on; it has inherited the descriptor."""
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.model_dump_json().encode(), 0)

    def owner(self) -> ProcessId | None:
        """The living process that holds the lock."""
        try:
            owner = ProcessId.model_validate_json(self._lock_file.read_bytes())
        except (OSError, ValidationError):
            return None
        return owner if owner.alive() and self._locked() else None

    def _locked(self) -> bool:
        with self._lock_file.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def read_status(self) -> MeshStatus | None:
        """The last status written; None when there is none, or it cannot be understood."""
        try:
            return MeshStatus.model_validate_json(self._status_file.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            return None

    def write_status(self, status: MeshStatus) -> None:
        _replace(self._status_file, status.model_dump_json(indent=1))

    def clear_status(self) -> None:
        self._status_file.unlink(missing_ok=True)

    def read_config(self) -> Config:
        """The configuration the mesh runs with."""
        return load_config(self.config_file)

    def write_config(self, config: Config) -> None:
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        _replace(
            self.config_file, "# Written by `kvmesh up`: what the running mesh was configured with.\n" + text
        )


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)
