"""Leases in a JetStream KV bucket.

A worker puts its registration under its id at every heartbeat; the bucket's age limit drops what is not
renewed. The bucket is recreated by whoever first finds it missing (a restarted NATS has lost it).

Readers listen to the bucket's subjects directly, so that they need no consumer that a server restart would
take with it. Since the server tells nobody when a key ages out, each reader keeps its own timers, and when
one runs out it asks the bucket: only a bucket that answers, and no longer has the key, ends a lease. While
the bus is away nothing expires.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog
from nats.js.errors import KeyNotFoundError
from nats.js.kv import KeyValue

from kvmesh.common.buckets import BUS_FAILURES, open_bucket, read_all
from kvmesh.common.bus import Bus
from kvmesh.common.config import DiscoveryConfig
from kvmesh.common.discovery.contract import Discovery
from kvmesh.common.tasks import cancel
from kvmesh.v1.common_pb2 import WorkerInfo

log = structlog.get_logger()


class NatsDiscovery(Discovery):
    def __init__(self, config: DiscoveryConfig, bus: Bus) -> None:
        super().__init__()
        self._config = config
        self._bus = bus
        self._prefix = f"$KV.{config.bucket}."
        # Loop time at which each member's lease runs out unless it is renewed.
        self._deadlines: dict[str, float] = {}
        self._info: Callable[[], WorkerInfo] | None = None
        self._registered_id = ""
        self._wake_beat = asyncio.Event()
        self._wake_watch = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._beating: asyncio.Task[None] | None = None
        self._sync_due = True
        self._bucket: KeyValue | None = None
        self._bus_listening = False

    async def start(self) -> None:
        if self._watching is not None:
            return
        await self._bus.subscribe(f"{self._prefix}>", self._on_message)
        self._listen_to_bus()
        self._watching = asyncio.create_task(self._watch(), name="discovery-watch")

    async def register(self, info: Callable[[], WorkerInfo]) -> None:
        self._info = info
        self._listen_to_bus()
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat(), name="discovery-heartbeat")
        else:
            self._wake_beat.set()

    async def deregister(self) -> None:
        self._info = None
        beating, self._beating = self._beating, None
        if beating is None:
            return
        # A put under way must not land after the delete.
        await cancel(beating)
        if not self._registered_id:
            return
        with contextlib.suppress(*BUS_FAILURES):
            bucket = await self._open()
            if bucket is not None:
                await bucket.delete(self._registered_id)
        self._registered_id = ""

    async def close(self) -> None:
        await self.deregister()
        watching, self._watching = self._watching, None
        await cancel(watching)

    # The worker's side.

    async def _beat(self) -> None:
        while True:
            self._wake_beat.clear()
            if self._info is not None:
                await self._renew(self._info())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.heartbeat_s):
                    await self._wake_beat.wait()

    async def _renew(self, info: WorkerInfo) -> None:
        try:
            bucket = await self._open()
            if bucket is not None:
                self._registered_id = info.id
                await bucket.put(info.id, info.SerializeToString())
        except BUS_FAILURES as error:
            # The bucket may be gone: the next heartbeat opens it anew.
            self._bucket = None
            if self._bus.connected:
                log.warning("lease not renewed", worker=info.id, error=str(error) or type(error).__name__)

    # The reader's side.

    def _on_message(self, subject: str, payload: bytes) -> None:
        self._apply(subject.removeprefix(self._prefix), payload)

    def _apply(self, worker_id: str, payload: bytes) -> None:
        if not payload:
            # A delete marker.
            self._deadlines.pop(worker_id, None)
            self._drop(worker_id, "deregistered")
            return
        try:
            info = WorkerInfo.FromString(payload)
        except Exception:
            log.warning("unreadable registration ignored", worker=worker_id, bytes=len(payload))
            return
        if info.id != worker_id:
            log.warning("registration under another id ignored", key=worker_id, worker=info.id)
            return
        if not self._deadlines:
            # The watch sleeps while there is nothing to expire.
            self._wake_watch.set()
        self._deadlines[worker_id] = self._now() + self._config.ttl_s
        self._put(info)

    async def _watch(self) -> None:
        while True:
            self._wake_watch.clear()
            if self._bus.connected:
                try:
                    if self._sync_due:
                        await self._sync()
                    await self._expire()
                except BUS_FAILURES as error:
                    self._bucket = None
                    log.warning("registry not readable", error=str(error) or type(error).__name__)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._wake_watch.wait()

    def _pause(self) -> float | None:
        """Seconds until the watch has something to do; None while only the bus can give it work."""
        if not self._bus.connected:
            return None
        if self._sync_due:
            return self._config.heartbeat_s
        if not self._deadlines:
            return None
        return max(min(self._deadlines.values()) - self._now(), 0.25)

    async def _sync(self) -> None:
        """Read the whole bucket. Those it does not list get a fresh lease: they may be renewing just now."""
        bucket = await self._open()
        if bucket is None:
            return
        fresh = self._now() + self._config.ttl_s
        for worker_id in self._deadlines:
            self._deadlines[worker_id] = fresh
        for worker_id, registration in (await read_all(bucket)).items():
            self._apply(worker_id, registration)
        self._sync_due = False

    async def _expire(self) -> None:
        now = self._now()
        overdue = [worker_id for worker_id, deadline in self._deadlines.items() if deadline <= now]
        if not overdue:
            return
        bucket = await self._open()
        if bucket is None:
            return
        for worker_id in overdue:
            try:
                await bucket.get(worker_id)
            except KeyNotFoundError:
                # Renewed while we asked?
                if self._deadlines.get(worker_id, now) <= now:
                    self._deadlines.pop(worker_id, None)
                    self._drop(worker_id, "lease expired")

    def _listen_to_bus(self) -> None:
        if not self._bus_listening:
            self._bus_listening = True
            self._bus.on_reconnect(self._on_connected)

    def _on_connected(self) -> None:
        self._bucket = None
        self._sync_due = True
        self._wake_beat.set()
        self._wake_watch.set()

    async def _open(self) -> KeyValue | None:
        """The bucket, made if it is missing; None while disconnected."""
        client = self._bus.client
        if client is None:
            return None
        if self._bucket is None:
            # One that another configuration made with another TTL keeps that.
            self._bucket = await open_bucket(
                client, self._config.bucket, max_age_s=self._config.ttl_s, on_disk=False
            )
        return self._bucket

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
