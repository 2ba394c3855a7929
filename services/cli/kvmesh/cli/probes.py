"""Ways to ask a process whether it is ready."""

from __future__ import annotations

import asyncio
import json
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.common.config import MeshTlsConfig
from kvmesh.common.grpc.client import Channels
from kvmesh.common.tls import MeshTls

DEADLINE_S = 2.0


class Probe(ABC):
    """One process's question; belongs to one event loop."""

    @abstractmethod
    async def ready(self) -> bool:
        """Whether the process serves now; never raises, answers within `DEADLINE_S` seconds."""

    @abstractmethod
    async def close(self) -> None:
        """Give back connections; idempotent."""


class GrpcHealth(Probe):
    """`grpc.health.v1` under a service's name, which kvmesh roles set to SERVING when they are ready."""

    def __init__(self, address: str, service: str, tls: MeshTlsConfig) -> None:
        self._address = address
        self._request = health_pb2.HealthCheckRequest(service=service)
        self._channels = Channels(MeshTls.of(tls))

    async def ready(self) -> bool:
        stub: Any = health_pb2_grpc.HealthStub(self._channels.get(self._address))
        try:
            answer = await stub.Check(self._request, timeout=DEADLINE_S)
        except grpc.aio.AioRpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def close(self) -> None:
        await self._channels.close()


class NatsGreeting(Probe):
    """The INFO line a NATS server greets with; ready once it offers JetStream."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port

    async def ready(self) -> bool:
        try:
            async with asyncio.timeout(DEADLINE_S):
                reader, writer = await asyncio.open_connection(self._host, self._port)
                try:
                    greeting = await reader.readline()
                finally:
                    writer.close()
            return greeting.startswith(b"INFO ") and bool(json.loads(greeting[5:]).get("jetstream"))
        except (OSError, TimeoutError, ValueError):
            return False

    async def close(self) -> None:
        pass


class ForkserverGreeting(Probe):
    """The first packet of a process that has SGLang imported; it comes when that is done."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def ready(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            asking.setblocking(False)
            try:
                asking.connect(self._path)
                async with asyncio.timeout(DEADLINE_S):
                    return bool(await asyncio.get_running_loop().sock_recv(asking, 4096))
            except (OSError, TimeoutError):
                return False

    async def close(self) -> None:
        pass


class Always(Probe):
    """Ready as soon as it runs."""

    async def ready(self) -> bool:
        return True

    async def close(self) -> None:
        pass


MakeProbe = Callable[[], Probe]
