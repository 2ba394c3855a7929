"""The keys that open this mesh: those of a file, and those in the bucket, followed as they change.

Once read, keys stay known while the bus is away. Until the bucket has been read for the first time, an issued
key that is not known may still be good: it is answered with "try again", not "wrong".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import structlog
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from kvmesh.common.buckets import BUS_FAILURES, open_bucket, read_all
from kvmesh.common.bus import Bus
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.tasks import cancel
from kvmesh.frontend.tenants.contract import Key, Secret, digest_of, issued_id
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

_RETRY_S = 1.0
# A digest is looked up by its first characters, then compared whole in constant time.
_SELECTOR = 16


class KeyRing:
    """Belongs to one event loop."""

    def __init__(
        self, fixed: Iterable[Key], bus: Bus | None, bucket: str, clock: Callable[[], float]
    ) -> None:
        """`fixed` are the file's keys; `bus` None: there are no others."""
        self._bus = bus
        self._name = bucket
        self._clock = clock
        self._fixed = {key.id: key for key in fixed}
        self._stored: dict[str, Key] = {}
        self._by_selector: dict[str, list[Key]] = {}
        # Came while the bucket was being read.
        self._late: dict[str, Key | None] = {}
        self._read = bus is None
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._changed: list[Callable[[Key], None]] = []
        self._arrange()

    async def start(self) -> None:
        if self._bus is None:
            return
        await self._bus.subscribe(f"$KV.{self._name}.>", self._on_message)
        self._bus.on_reconnect(self._wake.set)
        if self._bus.connected:
            self._wake.set()
        self._task = asyncio.create_task(self._follow(), name="keys")

    async def close(self) -> None:
        await cancel(self._task)

    def on_change(self, callback: Callable[[Key], None]) -> None:
        """Call `callback` with every key that was added or changed from now on."""
        self._changed.append(callback)

    @property
    def complete(self) -> bool:
        """Whether the bucket has been read."""
        return self._read

    def find(self, text: str) -> Key:
        """The live key that the text opens.

        Raises KvmeshError: UNAUTHENTICATED, or UNAVAILABLE while the text may be a key not read yet.
        """
        now, digest = self._clock(), digest_of(text)
        found = None
        for key in self._by_selector.get(digest[:_SELECTOR], ()):
            if key.opened_by(digest, now) and key.live(now):
                found = key
        if found is not None:
            return found
        if not self._read and issued_id(text):
            raise KvmeshError(
                ErrorCode.ERROR_CODE_UNAVAILABLE,
                "the keys cannot be read yet; try again soon",
                retry_after_ms=1_000,
            )
        raise KvmeshError(
            ErrorCode.ERROR_CODE_UNAUTHENTICATED,
            "the API key is not known here, has expired or was revoked; send a valid one as "
            "`Authorization: Bearer KEY`",
        )

    def _on_message(self, subject: str, payload: bytes) -> None:
        key_id = subject.removeprefix(f"$KV.{self._name}.")
        key = _decode(key_id, payload)
        self._late[key_id] = key
        old = self._stored.pop(key_id, None)
        if key is not None:
            self._stored[key_id] = key
        self._arrange()
        if key is not None and key != old:
            for callback in self._changed:
                callback(key)

    async def _follow(self) -> None:
        """Read the whole bucket at every connection: messages may have been missed before it."""
        assert self._bus is not None
        while True:
            await self._wake.wait()
            self._wake.clear()
            client = self._bus.client
            if client is None:
                continue
            self._late = {}
            try:
                values = await read_all(await open_bucket(client, self._name))
            except BUS_FAILURES as error:
                log.warning("keys not readable", error=str(error) or type(error).__name__)
                await asyncio.sleep(_RETRY_S)
                self._wake.set()
                continue
            keys = {key_id: _decode(key_id, value) for key_id, value in values.items()} | self._late
            self._stored = {key_id: key for key_id, key in keys.items() if key is not None}
            self._read = True
            self._arrange()
            for key in self._stored.values():
                for callback in self._changed:
                    callback(key)

    def _arrange(self) -> None:
        by_selector: dict[str, list[Key]] = {}
        # The file's keys win over stored ones of the same id.
        for key in {**self._stored, **self._fixed}.values():
            for secret in key.secrets:
                by_selector.setdefault(secret.sha256[:_SELECTOR], []).append(key)
        self._by_selector = by_selector


def _decode(key_id: str, payload: bytes) -> Key | None:
    """None for a deleted key, and for what cannot be read."""
    if not payload:
        return None
    try:
        key = Key.model_validate_json(payload)
    except ValidationError:
        log.warning("unreadable key ignored", key=key_id)
        return None
    return key if key.id == key_id else None


class _FixedKey(Key):
    """A key as the file has it: `key` in plain text, or `sha256`; everything else as in `Key`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str = ""
    sha256: str = ""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[_FixedKey] = []


def read_file(path: str) -> list[Key]:
    """The keys of a YAML file. Raises KvmeshError(INVALID_ARGUMENT); no message has a key's text."""
    try:
        data: Any = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        raise invalid(f"cannot read the keys of {path}: {error.strerror}") from None
    except yaml.YAMLError:
        raise invalid(f"{path} is not valid YAML") from None
    try:
        fixed = _File.model_validate(data).keys
        keys = [_fixed(path, key) for key in fixed]
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise invalid(f"{path}: `{place}`: {first['msg'].lower()}") from None
    if twice := {key.id for key in keys if sum(other.id == key.id for other in keys) > 1}:
        raise invalid(f"{path}: more than one key has the id {min(twice)}")
    return keys


def _fixed(path: str, given: _FixedKey) -> Key:
    if bool(given.key) == bool(given.sha256):
        raise invalid(f"{path}: key {given.id} needs `key` or `sha256`, one of them")
    secret = Secret(sha256=given.sha256 or digest_of(given.key))
    return Key(**given.model_dump(exclude={"key", "sha256", "secrets"}), secrets=(secret,))
