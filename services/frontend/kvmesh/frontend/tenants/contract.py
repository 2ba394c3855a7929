"""A tenant's key and what it allows; every other file here reads, checks or counts against it."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

# Begins every issued key, so that scanners for leaked secrets can know it.
MARK = "sk-km"
_ISSUED = re.compile(rf"{MARK}-([0-9a-f]{{12}})-[A-Za-z0-9_-]{{43}}")

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:@-]{0,63}$")]
Count = Annotated[int, Field(ge=0, le=10**15)]


class Limits(NamedTuple):
    """What a key may use, by dimension; 0 is no limit."""

    # A minute's worth may be used at once; it comes back evenly over a minute.
    requests: int
    tokens: int
    # Requests alive at once.
    concurrency: int
    # Prompt and output tokens in a calendar month, UTC.
    month: int


class Secret(BaseModel):
    """SHA-256 of a key's text. The text has 256 random bits, so that a slow hash would add nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    until: float = 0.0
    """Unix time after which it opens nothing; 0: none. Set on what `rotate` has replaced"""


class Key(BaseModel):
    """A key as it is stored: everything but its text."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: Name
    """names the key in lists, logs and stores; part of an issued key's text"""
    tenant: Name
    name: Annotated[str, Field(max_length=128)] = ""
    """what it is for, in its owner's words"""
    secrets: tuple[Secret, ...] = ()
    models: tuple[str, ...] = ()
    """names or aliases it may ask for; empty: all"""
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    """of its requests; a request may ask for less"""
    requests_per_minute: Count = 0
    tokens_per_minute: Count = 0
    concurrency: Count = 0
    tokens_per_month: Count = 0
    created: float = 0.0
    expires: float = 0.0
    """Unix time; 0: never"""
    revoked: float = 0.0
    """Unix time at which it was revoked; 0: it was not"""

    @property
    def limits(self) -> Limits:
        return Limits(
            self.requests_per_minute, self.tokens_per_minute, self.concurrency, self.tokens_per_month
        )

    def live(self, now: float) -> bool:
        return not self.revoked and (not self.expires or now < self.expires)

    def opened_by(self, digest: str, now: float) -> bool:
        """Whether the digest of what a client sent is one of the key's own; in constant time."""
        fits = [
            hmac.compare_digest(secret.sha256, digest) and (not secret.until or now < secret.until)
            for secret in self.secrets
        ]
        return any(fits)

    def allows(self, names: tuple[str, ...]) -> bool:
        """Whether it may ask for the model that has these names."""
        return not self.models or any(name in self.models for name in names)


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def issue(key_id: str = "") -> tuple[str, str]:
    """A fresh key's id (or the one given) and text."""
    key_id = key_id or secrets.token_hex(6)
    return key_id, f"{MARK}-{key_id}-{secrets.token_urlsafe(32)}"


def issued_id(text: str) -> str:
    """The id in an issued key's text; empty where it does not look like one."""
    match = _ISSUED.fullmatch(text)
    return match[1] if match else ""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request. `key` is None where no keys are asked for."""

    key: Key | None = None

    @property
    def tenant(self) -> str:
        return self.key.tenant if self.key else ""


ANYONE = Caller()
# Of the request that the running task answers.
CALLER: ContextVar[Caller] = ContextVar("kvmesh_caller", default=ANYONE)


def wall_clock() -> float:
    """Unix time: what frontends agree on."""
    return time.time()
