"""A request's life in the mesh: placed, tried elsewhere where that helps, streamed, ended."""

from __future__ import annotations

import asyncio
import time

import structlog

from kvmesh.common import metrics, telemetry
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.attempt import Attempt, Output
from kvmesh.frontend.call import Call
from kvmesh.frontend.mesh import Mesh
from kvmesh.frontend.tenants.charge import Charge
from kvmesh.v1.engine_pb2 import EngineRequest, Finish
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

_MAX_ATTEMPTS = 4
# When no other worker is left, the one that failed may be back after this long.
_RETRY_PAUSE_S = 0.25
# Whoever fails so, fails so everywhere.
_FINAL = {ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED, ErrorCode.ERROR_CODE_CANCELLED}


class Session:
    """One request, driven by one task: `start`, `next` until `finished`, and always `close`."""

    def __init__(self, mesh: Mesh, call: Call) -> None:
        self.call = call
        self.output_tokens = 0
        # Milliseconds spent on placing, all attempts together.
        self.route_ms = 0.0
        self._mesh = mesh
        self._attempt: Attempt | None = None
        self._aborted: KvmeshError | None = None
        self._closed = False
        self._last_at = 0.0
        self._metrics = metrics.frontend()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, call.deadline - time.monotonic()), self._on_deadline)
        mesh.sessions.add(self)

    @property
    def started(self) -> bool:
        """Whether tokens have come."""
        return self._attempt is not None and bool(self._attempt.first_at)

    @property
    def attempt(self) -> Attempt:
        """The attempt that streams; after `start`."""
        assert self._attempt is not None
        return self._attempt

    @property
    def finish(self) -> Finish | None:
        """Set once the last tokens have been returned by `next`."""
        attempt = self.attempt
        return attempt.finish if not attempt.tokens else None

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to ask `next` for."""
        return self.attempt.done and not self.attempt.tokens and self.attempt.error is None

    async def start(self) -> None:
        """Return when the first tokens are there. Raises KvmeshError; nothing is left running then."""
        if self.call.charge is not None:
            await self.call.charge.reserve()
        excluded: list[str] = []
        failure: KvmeshError | None = None
        for _ in range(_MAX_ATTEMPTS):
            self._check()
            attempt = await self._place(excluded, failure)
            if attempt is None:
                excluded.clear()
                await asyncio.sleep(_RETRY_PAUSE_S)
                continue
            await attempt.changed()
            failure = attempt.error
            if failure is None:
                self._record_first(attempt)
                return
            self._end_attempt()
            if not failure.retryable or failure.code in _FINAL:
                break
            reason = ErrorCode.Name(failure.code).removeprefix("ERROR_CODE_").lower()
            self._metrics.retries.labels(reason).inc()
            log.info(
                "trying elsewhere",
                request_id=self.call.request_id,
                worker=attempt.failed_worker,
                error=failure.message,
            )
            excluded.append(attempt.failed_worker)
        self._check()
        assert failure is not None
        # Where the client wrote it.
        failure.param = self.call.params.get(failure.param or "", failure.param)
        failure.retry_after_ms = failure.retry_after_ms or (1_000 if failure.retryable else 0)
        raise failure

    async def next(self) -> Output:
        """What has come since the last call, at least one token unless the answer is complete.

        Raises KvmeshError when the answer cannot be completed.
        """
        attempt = self.attempt
        if not attempt.tokens:
            await attempt.changed()
        output = attempt.take()
        if not output.token_ids:
            if attempt.error is not None:
                raise attempt.error
            return output
        count = len(output.token_ids)
        self.output_tokens += count
        if attempt.routed.lease is not None:
            attempt.routed.lease.output_tokens = self.output_tokens
        now = time.monotonic()
        if self._last_at:
            self._metrics.itl.observe((now - self._last_at) / count)
        self._last_at = now
        return output

    def abort(self, error: KvmeshError) -> None:
        """End the request with an error, whatever it is doing."""
        self._aborted = error
        if self._attempt is not None:
            self._attempt.fail(error)

    def close(self) -> None:
        """Cancel what still runs on any engine and free the lease; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        self._mesh.sessions.discard(self)
        self._end_attempt()
        if self.started:
            self._count()
        if self.call.charge is not None:
            self._settle(self.call.charge)

    def _on_deadline(self) -> None:
        waited = time.monotonic() - self.call.received
        why = f"the request took longer than {waited:.3g} s"
        self.abort(KvmeshError(ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED, why))

    def _check(self) -> None:
        if self._aborted is not None:
            raise self._aborted

    async def _place(self, excluded: list[str], failure: KvmeshError | None) -> Attempt | None:
        """Start an attempt. None: nobody is left but those that failed, and one more look is worth it."""
        begun = time.perf_counter()
        try:
            routed = await self._mesh.placer.place(self.call, excluded)
        except KvmeshError as error:
            if error.code == ErrorCode.ERROR_CODE_NO_WORKER_READY and excluded:
                return None
            # What went wrong at first says more than that nobody is left.
            raise failure or error from None
        finally:
            self.route_ms += (time.perf_counter() - begun) * 1000
        attempt = self._attempt = Attempt(routed)
        self._check()
        placement = routed.placement
        split = placement.HasField("prefill")
        attempt.start(
            self._engine_request(attempt),
            self._mesh.link(placement.decode, prefill=False),
            self._mesh.link(placement.prefill, prefill=True) if split else None,
        )
        return attempt

    def _engine_request(self, attempt: Attempt) -> EngineRequest:
        call = self.call
        placement = attempt.routed.placement
        return EngineRequest(
            request_id=call.request_id,
            token_ids=call.token_ids,
            sampling=call.sampling,
            bootstrap=placement.bootstrap if placement.HasField("bootstrap") else None,
            priority=call.priority,
            cache_salt=call.cache_salt,
            timeout_ms=max(1, int((call.deadline - time.monotonic()) * 1000)),
            traceparent=telemetry.current_traceparent(),
        )

    def _end_attempt(self) -> None:
        if self._attempt is not None:
            self._attempt.cancel()
            if self._attempt.routed.lease is not None:
                self._attempt.routed.lease.end()

    def _count(self) -> None:
        """Tokens of a request that ran, whether or not it was completed."""
        self._metrics.prompt_tokens.inc(len(self.call.token_ids))
        self._metrics.output_tokens.inc(self.output_tokens)
        self._metrics.isl.observe(len(self.call.token_ids))
        self._metrics.osl.observe(self.output_tokens)
        cached = self.attempt.cached
        for tier in ("device", "host", "nvme", "network"):
            self._metrics.cached_tokens.labels(tier).inc(getattr(cached, tier))

    def _settle(self, charge: Charge) -> None:
        cached = 0
        if self.started:
            tiers = self.attempt.cached
            cached = tiers.device + tiers.host + tiers.nvme + tiers.network
        charge.settle(started=self.started, output_tokens=self.output_tokens, cached_tokens=cached)

    def _record_first(self, attempt: Attempt) -> None:
        if attempt.first_at:
            self._metrics.ttft.observe(attempt.first_at - self.call.received)
