"""All callers' streams of one worker, and whether they may start requests."""

from __future__ import annotations

import asyncio

from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.streams import Stream
from kvmesh.common.metrics import WorkerMetrics
from kvmesh.engine.contract import Engine
from kvmesh.engine.worker.connection import Command, Connection, Response
from kvmesh.v1.errors_pb2 import ErrorCode


class Streams:
    """Closed until `open`, closed again by `drain`; streams may be held all the while.

    A request that cannot be taken is refused by its own step, so that a stream outlives it.
    """

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics
        self._engine: Engine | None = None
        self._refusal = "the worker is starting; try another one or wait"
        self._connections: set[Connection] = set()

    @property
    def live(self) -> int:
        """Requests of all streams."""
        return sum(connection.live for connection in self._connections)

    def open(self, engine: Engine) -> None:
        """Let requests start on `engine`."""
        self._engine = engine

    def accept(self, stream: Stream, command: Command, response: Response, method: str) -> Connection:
        """The handler of a new stream."""
        connection = Connection(stream, self._current, command, response, method, self._metrics, self._closed)
        self._connections.add(connection)
        self._metrics.streams.inc()
        return connection

    async def drain(self, seconds: float) -> int:
        """Refuse new requests, wait for those under way, and end the streams; the number of requests cut off.

        Requests left after `seconds` are aborted, with a finish that says that another worker may take them.
        """
        self._refusal = "the worker is shutting down; try another one"
        self._engine = None
        await self._settle(seconds)
        left = self.live
        if left:
            self.abort_all(self._unavailable())
            await self._settle(1.0)
        for connection in self._connections:
            connection.complete()
        return left

    def abort_all(self, why: KvmeshError) -> None:
        """End every request with an ERROR finish."""
        for connection in self._connections:
            connection.abort_all(why)

    async def _settle(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        # Looked at, not signalled: requests end thousands of times a second and workers only once.
        while loop.time() < deadline and not all(c.settled for c in self._connections):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def _closed(self, connection: Connection) -> None:
        self._connections.remove(connection)
        self._metrics.streams.dec()

    def _current(self) -> Engine:
        if self._engine is None:
            raise self._unavailable()
        return self._engine

    def _unavailable(self) -> KvmeshError:
        return KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, self._refusal)
