"""Workers by their leases in a JetStream KV bucket."""

from __future__ import annotations

from collections.abc import Callable

import structlog
from google.protobuf.message import DecodeError

from kvmesh.common.bus import Bus
from kvmesh.common.config import DiscoveryConfig
from kvmesh.common.discovery.contract import Discovery
from kvmesh.common.discovery.leases import LeaseBucket
from kvmesh.v1.common_pb2 import WorkerInfo

log = structlog.get_logger()


class NatsDiscovery(Discovery):
    def __init__(self, config: DiscoveryConfig, bus: Bus) -> None:
        super().__init__()
        self._leases = LeaseBucket(config, bus, config.bucket, self._take, self._drop)

    async def start(self) -> None:
        await self._leases.watch()

    async def register(self, info: Callable[[], WorkerInfo]) -> None:
        await self._leases.hold(info().id, lambda: info().SerializeToString())

    async def deregister(self) -> None:
        await self._leases.release()

    async def close(self) -> None:
        await self._leases.close()

    def _take(self, worker_id: str, payload: bytes) -> bool:
        try:
            info = WorkerInfo.FromString(payload)
        except DecodeError:
            log.warning("unreadable registration ignored", worker=worker_id, bytes=len(payload))
            return False
        if info.id != worker_id:
            log.warning("registration under another id ignored", key=worker_id, worker=info.id)
            return False
        self._put(info)
        return True
