"""Leases in a JetStream KV bucket: values, each there for as long as its owner renews it.

An owner puts its value under its id at every heartbeat; the bucket's age limit drops what is not
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
from kvmesh.common.tasks import cancel

log = structlog.get_logger()


class LeaseBucket:
    """A view of one bucket, and at most one lease of its own. Belongs to one event loop."""

    def __init__(
        self,
        config: DiscoveryConfig,
        bus: Bus,
        bucket: str,
        put: Callable[[str, bytes], bool],
        drop: Callable[[str, str], None],
    ) -> None:
        """`put(id, value)` is called for every renewal, and says whether the value can be read;
        `drop(id, why)` when a lease has ended."""
        self._config = config
        self._bus = bus
        self._name = bucket
        self._put = put
        self._drop = drop
        self._prefix = f"$KV.{bucket}."
        # Loop time at which each lease runs out unless it is renewed.
        self._deadlines: dict[str, float] = {}
        self._id = ""
        self._value: Callable[[], bytes] | None = None
        self._held = False
        self._wake_beat = asyncio.Event()
        self._wake_watch = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._beating: asyncio.Task[None] | None = None
        self._sync_due = True
        self._bucket: KeyValue | None = None
        self._bus_listening = False

    async def watch(self) -> None:
        """Begin watching; returns at once, whether or not the bus is there. Idempotent."""
        if self._watching is not None:
            return
        await self._bus.subscribe(f"{self._prefix}>", self._on_message)
        self._listen_to_bus()
        self._watching = asyncio.create_task(self._watch(), name="discovery-watch")

    async def hold(self, id_: str, value: Callable[[], bytes]) -> None:
        """Keep a lease alive with `value()` at every heartbeat, until `release`; renews now if it is held."""
        self._id, self._value = id_, value
        self._listen_to_bus()
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat(), name="discovery-heartbeat")
        else:
            self._wake_beat.set()

    async def release(self) -> None:
        """Give the lease back. Idempotent; takes two seconds at most."""
        self._value = None
        beating, self._beating = self._beating, None
        if beating is None:
            return
        # A put under way must not land after the delete.
        await cancel(beating)
        if not self._held:
            return
        with contextlib.suppress(*BUS_FAILURES):
            bucket = await self._open()
            if bucket is not None:
                await bucket.delete(self._id)
        self._held = False

    async def close(self) -> None:
        """Give the lease back and stop watching. Idempotent."""
        await self.release()
        watching, self._watching = self._watching, None
        await cancel(watching)

    # The owner's side.

    async def _beat(self) -> None:
        while True:
            self._wake_beat.clear()
            if self._value is not None:
                await self._renew(self._value())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.heartbeat_s):
                    await self._wake_beat.wait()

    async def _renew(self, value: bytes) -> None:
        try:
            bucket = await self._open()
            if bucket is not None:
                self._held = True
                await bucket.put(self._id, value)
        except BUS_FAILURES as error:
            # The bucket may be gone: the next heartbeat opens it anew.
            self._bucket = None
            if self._bus.connected:
                log.warning("lease not renewed", id=self._id, error=str(error) or type(error).__name__)

    # The reader's side.

    def _on_message(self, subject: str, payload: bytes) -> None:
        self._apply(subject.removeprefix(self._prefix), payload)

    def _apply(self, id_: str, payload: bytes) -> None:
        if not payload:
            # A delete marker.
            self._deadlines.pop(id_, None)
            self._drop(id_, "deregistered")
            return
        if not self._put(id_, payload):
            return
        if not self._deadlines:
            # The watch sleeps while there is nothing to expire.
            self._wake_watch.set()
        self._deadlines[id_] = self._now() + self._config.ttl_s

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
                    log.warning(
                        "registry not readable", bucket=self._name, error=str(error) or type(error).__name__
                    )
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
        for id_ in self._deadlines:
            self._deadlines[id_] = fresh
        for id_, registration in (await read_all(bucket)).items():
            self._apply(id_, registration)
        self._sync_due = False

    async def _expire(self) -> None:
        now = self._now()
        overdue = [id_ for id_, deadline in self._deadlines.items() if deadline <= now]
        if not overdue:
            return
        bucket = await self._open()
        if bucket is None:
            return
        for id_ in overdue:
            try:
                await bucket.get(id_)
            except KeyNotFoundError:
                # Renewed while we asked?
                if self._deadlines.get(id_, now) <= now:
                    self._deadlines.pop(id_, None)
                    self._drop(id_, "lease expired")

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
            self._bucket = await open_bucket(client, self._name, max_age_s=self._config.ttl_s, on_disk=False)
        return self._bucket

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
