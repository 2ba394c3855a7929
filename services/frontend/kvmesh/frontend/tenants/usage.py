"""What each tenant used of each model, hour by hour, in a JetStream KV bucket.

A frontend counts for itself, and writes its own running totals under `<hour>.<tenant>.<model>.<process>`; the
sum over processes is the usage. A write that is repeated changes nothing, so that totals are exact over
outages of the bus; a frontend that is killed loses what came since its last write (`WRITE_S`).
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache

import orjson
import structlog

from kvmesh.common import metrics
from kvmesh.common.buckets import BUS_FAILURES, open_bucket
from kvmesh.common.bus import Bus
from kvmesh.common.tasks import cancel

log = structlog.get_logger()

WRITE_S = 1.0
_HOUR_S = 3600
DAY_S = 86_400.0


@dataclass(slots=True)
class Used:
    requests: int = 0
    prompt_tokens: int = 0
    # Of these, not computed.
    cached_tokens: int = 0
    output_tokens: int = 0
    # New counts come behind the others: values are written by place, and those of before have fewer.
    cached_device_tokens: int = 0
    cached_host_tokens: int = 0
    cached_nvme_tokens: int = 0
    cached_network_tokens: int = 0
    # Of the output, what the model thought with.
    reasoning_tokens: int = 0

    def add(self, other: Used) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens
        self.cached_device_tokens += other.cached_device_tokens
        self.cached_host_tokens += other.cached_host_tokens
        self.cached_nvme_tokens += other.cached_nvme_tokens
        self.cached_network_tokens += other.cached_network_tokens
        self.reasoning_tokens += other.reasoning_tokens


@dataclass(frozen=True, slots=True)
class Entry:
    """One process's total in one hour."""

    # Unix time.
    hour: float
    tenant: str
    model: str
    used: Used


class UsageRecorder:
    """This process's counts. Belongs to one event loop."""

    def __init__(
        self, bus: Bus | None, bucket: str, retention_s: float, process: str, clock: Callable[[], float]
    ) -> None:
        """`process` names this run of the process, never used before; `bus` None: counts are metrics only."""
        self._bus = bus
        self._name = bucket
        self._retention_s = retention_s
        self._process = process
        self._clock = clock
        self._totals: dict[str, Used] = {}
        # Not written as they are now.
        self._dirty: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        measured = metrics.tenants()
        families = (
            measured.requests,
            measured.prompt_tokens,
            measured.cached_tokens,
            measured.output_tokens,
        )
        # To find them costs more than to count.
        self._counters = cache(lambda *labels: [family.labels(*labels) for family in families])

    def start(self) -> None:
        if self._bus is not None:
            self._task = asyncio.create_task(self._write_on(), name="usage")

    async def close(self) -> None:
        """Write what is left, if the bus is there."""
        task, self._task = self._task, None
        await cancel(task)
        if task is not None:
            await self._write()

    def count(self, tenant: str, model: str, used: Used) -> None:
        requests, prompt, cached, output = self._counters(tenant, model)
        requests.inc(used.requests)
        prompt.inc(used.prompt_tokens)
        cached.inc(used.cached_tokens)
        output.inc(used.output_tokens)
        if self._bus is None:
            return
        name = key_of(self._clock(), tenant, model, self._process)
        total = self._totals.get(name)
        if total is None:
            total = self._totals[name] = Used()
        total.add(used)
        self._dirty.add(name)

    async def _write_on(self) -> None:
        while True:
            await asyncio.sleep(WRITE_S)
            await self._write()

    async def _write(self) -> None:
        client = self._bus.client if self._bus is not None else None
        if client is None or not self._dirty:
            return
        try:
            bucket = await open_bucket(client, self._name, max_age_s=self._retention_s)
            for name in sorted(self._dirty):
                # Before the wait: what is counted meanwhile is for the next write.
                self._dirty.discard(name)
                try:
                    await bucket.put(name, orjson.dumps(astuple(self._totals[name])))
                except BaseException:
                    self._dirty.add(name)
                    raise
        except BUS_FAILURES as error:
            log.warning("usage not written, trying on", error=str(error) or type(error).__name__)
            return
        current = hour_text(self._clock())
        for name in [name for name in self._totals if not name.startswith(current)]:
            if name not in self._dirty:
                del self._totals[name]


def key_of(now: float, tenant: str, model: str, process: str) -> str:
    return _key_in(now // _HOUR_S, tenant, model, process)


@lru_cache(1_024)
def _key_in(hour: float, tenant: str, model: str, process: str) -> str:
    return f"{hour_text(hour * _HOUR_S)}.{_encode(tenant)}.{_encode(model)}.{process}"


def hour_text(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y%m%d%H")


def entries_of(values: dict[str, bytes]) -> Iterable[Entry]:
    """What the bucket's values say; foreign ones are skipped."""
    for name, value in values.items():
        try:
            hour, tenant, model, _process = name.split(".")
            at = datetime.strptime(hour, "%Y%m%d%H").replace(tzinfo=UTC).timestamp()
            yield Entry(at, _decode(tenant), _decode(model), Used(*map(int, orjson.loads(value))))
        except (ValueError, TypeError):
            log.warning("unreadable usage skipped", key=name)


def sums(entries: Iterable[Entry], since: float, tenant: str | None = None) -> dict[tuple[str, str], Used]:
    """Usage by (tenant, model) in the hours that end after `since` (Unix time)."""
    totals: dict[tuple[str, str], Used] = {}
    for entry in entries:
        if entry.hour + _HOUR_S > since and tenant in (None, entry.tenant):
            totals.setdefault((entry.tenant, entry.model), Used()).add(entry.used)
    return dict(sorted(totals.items()))


def _encode(name: str) -> str:
    """Any name as a part of a key; never empty."""
    return "-" + base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")


def _decode(part: str) -> str:
    text = part.removeprefix("-")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
