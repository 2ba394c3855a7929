"""Ledgers in a JetStream KV bucket, changed by compare-and-set; and the word that asks for unused credit."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable

import orjson
import structlog
from nats.js.errors import KeyNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from kvmesh.common.buckets import BUS_FAILURES, open_bucket
from kvmesh.common.bus import Bus
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.tenants.ledger import Ledger
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

# Given a ledger, None where there is none yet; returns what to write, None for nothing.
Change = Callable[[Ledger | None], Ledger | None]

# Seconds a change may take, other frontends' changes between included.
_CHANGE_S = 2.0
# After a failure every request would wait for the next one: for so long the bucket counts as away.
_PAUSE_S = 1.0
# Seconds other frontends have to give back what they do not need.
RECALL_S = 0.15
_SUBJECT = "kvmesh.quota"


class Exchange(ABC):
    """Where frontends share ledgers."""

    # This frontend, among the holders.
    holder: str

    @abstractmethod
    async def change(self, key_id: str, change: Change) -> None:
        """Apply `change` to the latest ledger; it may be called several times, the last call counts.

        Raises KvmeshError(UNAVAILABLE) where the ledger cannot be had; whether the change was written is
        then not known.
        """

    @abstractmethod
    async def recall(self, key_id: str) -> None:
        """Ask the others for credit they do not need; returns when one has answered, or none has in time."""


class NatsExchange(Exchange):
    def __init__(self, bus: Bus, bucket: str, holder: str, on_recall: Callable[[str], None]) -> None:
        """`on_recall(key_id)`: somebody else needs what this frontend holds; then call `returned`."""
        self.holder = holder
        self._bus = bus
        self._name = bucket
        self._on_recall = on_recall
        self._bucket: KeyValue | None = None
        # Key id -> revision and value as this frontend last wrote or read it.
        self._seen: dict[str, tuple[int, bytes]] = {}
        self._paused_until = 0.0
        self._recalls: dict[str, asyncio.Event] = {}

    async def start(self) -> None:
        await self._bus.subscribe(f"{_SUBJECT}.>", self._on_message)
        self._bus.on_reconnect(self._on_connected)

    async def change(self, key_id: str, change: Change) -> None:
        loop = asyncio.get_running_loop()
        client = self._bus.client
        if client is None or loop.time() < self._paused_until:
            raise _away()
        try:
            async with asyncio.timeout(_CHANGE_S):
                if self._bucket is None:
                    self._bucket = await open_bucket(client, self._name)
                while not await self._try(self._bucket, key_id, change):
                    pass
        except BUS_FAILURES as error:
            self._bucket = None
            self._seen.clear()
            self._paused_until = loop.time() + _PAUSE_S
            if self._bus.connected:
                log.warning("limits not shared for now", error=str(error) or type(error).__name__)
            raise _away() from None

    async def recall(self, key_id: str) -> None:
        answered = self._recalls.setdefault(key_id, asyncio.Event())
        self._bus.publish(f"{_SUBJECT}.recall", orjson.dumps([key_id, self.holder]))
        try:
            async with asyncio.timeout(RECALL_S):
                await answered.wait()
        except TimeoutError:
            pass
        finally:
            self._recalls.pop(key_id, None)

    def returned(self, key_id: str) -> None:
        """Tell those who wait that this frontend has given back what it did not need."""
        self._bus.publish(f"{_SUBJECT}.returned", orjson.dumps([key_id, self.holder]))

    async def _try(self, bucket: KeyValue, key_id: str, change: Change) -> bool:
        seen = self._seen.get(key_id)
        fresh = seen is None
        if seen is None:
            seen = self._seen[key_id] = await self._read(bucket, key_id)
        revision, raw = seen
        changed = change(_decode(key_id, raw))
        if changed is None:
            if fresh:
                return True
            # What was seen may be old: nothing is decided by it alone.
            self._seen.pop(key_id, None)
            return False
        payload = changed.encode()
        try:
            self._seen[key_id] = await bucket.update(key_id, payload, last=revision), payload
        except KeyWrongLastSequenceError:
            self._seen.pop(key_id, None)
            return False
        return True

    @staticmethod
    async def _read(bucket: KeyValue, key_id: str) -> tuple[int, bytes]:
        try:
            entry = await bucket.get(key_id)
        except KeyNotFoundError:
            return 0, b""
        return entry.revision or 0, entry.value or b""

    def _on_message(self, subject: str, payload: bytes) -> None:
        key_id, holder = orjson.loads(payload)
        if holder == self.holder:
            return
        if subject.endswith(".recall"):
            self._on_recall(key_id)
        elif (waiting := self._recalls.get(key_id)) is not None:
            waiting.set()

    def _on_connected(self) -> None:
        self._bucket = None
        self._seen.clear()
        self._paused_until = 0.0


def _decode(key_id: str, raw: bytes) -> Ledger | None:
    if not raw:
        return None
    try:
        return Ledger.decode(raw)
    except ValueError as error:
        log.warning("unreadable ledger replaced", key=key_id, error=str(error))
        return None


def _away() -> KvmeshError:
    return KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, "the bus is away")
