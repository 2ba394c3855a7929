"""Workers from a list: a YAML file of addresses, each polled for its registration.

```yaml
workers:
  - 10.0.0.1:9000
  - 10.0.0.2:9000
```

The file is read again when it changes. A worker that answers `GetWorker` is alive; one that stops answering
is gone after the TTL, one that leaves the file at once. Workers need not register: being listed is the
registration, and a worker that drains says so in its state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import structlog
import yaml

from kvmesh.common.config import DiscoveryConfig
from kvmesh.common.discovery.contract import Discovery
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.grpc.client import Channels
from kvmesh.common.tasks import cancel
from kvmesh.common.tls import MeshTls
from kvmesh.v1.common_pb2 import WorkerInfo
from kvmesh.v1.engine_pb2 import GetWorkerRequest
from kvmesh.v1.engine_pb2_grpc import WorkerServiceStub

log = structlog.get_logger()


class StaticDiscovery(Discovery):
    def __init__(self, config: DiscoveryConfig, tls: MeshTls | None = None) -> None:
        super().__init__()
        self._config = config
        self._path = Path(config.file)
        self._file_state: tuple[int, int] | None = None
        self._addresses: tuple[str, ...] = ()
        # Per address: who answered there last, and the loop time until which that holds.
        self._answers: dict[str, tuple[str, float]] = {}
        self._channels = Channels(tls)
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises KvmeshError(INVALID_ARGUMENT) when the file cannot be used now; later errors are logged."""
        if self._polling is None:
            if not self._config.file:
                raise invalid("`discovery.file` must name the worker list when `discovery.kind` is static")
            self._addresses = read_addresses(self._path)
            self._polling = asyncio.create_task(self._poll(), name="discovery-poll")

    async def register(self, info: Callable[[], WorkerInfo]) -> None:
        """Does nothing: whoever lists this worker's address asks it."""

    async def deregister(self) -> None:
        """Does nothing: readers see the worker drain, and then stop answering."""

    async def close(self) -> None:
        polling, self._polling = self._polling, None
        await cancel(polling)
        await self._channels.close()

    async def _poll(self) -> None:
        while True:
            await self._reread()
            await asyncio.gather(*(self._ask(address) for address in self._addresses))
            self._expire()
            await asyncio.sleep(self._config.heartbeat_s)

    async def _reread(self) -> None:
        try:
            status = self._path.stat()
            state = (status.st_mtime_ns, status.st_size)
            if state == self._file_state:
                return
            addresses = read_addresses(self._path)
        except (OSError, KvmeshError) as error:
            # Half-written, or being replaced: the last good list stands.
            log.warning("worker list not read", file=str(self._path), error=str(error))
            return
        self._file_state = state
        for address in set(self._addresses) - set(addresses):
            answer = self._answers.pop(address, None)
            await self._channels.forget(address)
            if answer is not None and not self._answered_elsewhere(answer[0]):
                self._drop(answer[0], "left the worker list")
        self._addresses = addresses

    async def _ask(self, address: str) -> None:
        stub = WorkerServiceStub(self._channels.get(address))
        try:
            response = await stub.GetWorker(GetWorkerRequest(), timeout=self._config.heartbeat_s)
        except grpc.RpcError:
            return
        worker = response.worker
        if not worker.id:
            log.warning("worker without an id ignored", address=address)
            return
        previous = self._answers.get(address)
        self._answers[address] = (worker.id, self._now() + self._config.ttl_s)
        if previous is not None and previous[0] != worker.id and not self._answered_elsewhere(previous[0]):
            self._drop(previous[0], "another worker answers at its address")
        self._put(worker)

    def _expire(self) -> None:
        now = self._now()
        for address, (worker_id, deadline) in list(self._answers.items()):
            if deadline <= now:
                del self._answers[address]
                if not self._answered_elsewhere(worker_id):
                    self._drop(worker_id, "stopped answering")

    def _answered_elsewhere(self, worker_id: str) -> bool:
        return any(known == worker_id for known, _ in self._answers.values())

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def read_addresses(path: Path) -> tuple[str, ...]:
    """The addresses of a worker list. Raises KvmeshError(INVALID_ARGUMENT) saying what is wrong with it."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise invalid(f"cannot read worker list {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise invalid(f"worker list {path} is not valid YAML: {error}") from None
    workers = data.get("workers") if isinstance(data, dict) else None
    if not isinstance(workers, list):
        raise invalid(f"worker list {path} must hold `workers:` with a list of host:port")
    for address in workers:
        host, _, port = str(address).rpartition(":")
        if not (isinstance(address, str) and host and port.isdecimal()):
            raise invalid(f"worker list {path}: `{address}` is not host:port")
    return tuple(dict.fromkeys(workers))
