"""A request's life in the mesh: placed, tried elsewhere where that helps, streamed, continued, ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import structlog

from kvmesh.common import metrics, telemetry
from kvmesh.common.errors import KvmeshError
from kvmesh.core import packed_field
from kvmesh.frontend.mesh.mesh import Mesh
from kvmesh.frontend.serving.attempt import Attempt, Output, Take
from kvmesh.frontend.serving.call import Call
from kvmesh.frontend.serving.continuation import Continuation
from kvmesh.frontend.tenants.charge import Charge
from kvmesh.v1.common_pb2 import CachedTokens
from kvmesh.v1.engine_pb2 import EngineRequest, Finish
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import Placement

log = structlog.get_logger()

_MAX_ATTEMPTS = 4
# A request that takes every worker down with it must not go through all of them.
_MAX_CONTINUATIONS = 3
# When no other worker is left, the one that failed may be back after this long.
_RETRY_PAUSE_S = 0.25
# Whoever fails so, fails so everywhere.
_FINAL = {ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED, ErrorCode.ERROR_CODE_CANCELLED}


class Session:
    """One request, driven by one task: `start`, `next` until `finished`, and always `close`."""

    def __init__(self, mesh: Mesh, call: Call) -> None:
        self.call = call
        self.output_tokens = 0
        # Of these, what the model thought with; said by who reads them, before `close`.
        self.reasoning_tokens = 0
        # Milliseconds spent on placing, all attempts together.
        self.route_ms = 0.0
        # Decode workers that went on with the answer after others were lost.
        self.continued_on: list[str] = []
        self._mesh = mesh
        # The one that began the answer, and the one that streams now.
        self._first: Attempt | None = None
        self._attempt: Attempt | None = None
        self._continuation = Continuation(call)
        # Tokens that came from workers before this one.
        self._before = 0
        # Processes that were lost with a part of this request, and until when discovery may list them.
        self._lost: dict[tuple[str, int], float] = {}
        # Of the `next` that waits.
        self._taker: Take | None = None
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
        return self._first is not None and bool(self._first.first_at)

    @property
    def attempt(self) -> Attempt:
        """The attempt that computed the prompt and began the answer; after `start`."""
        assert self._first is not None
        return self._first

    @property
    def finish(self) -> Finish | None:
        """Set once the last tokens have been returned by `next`."""
        attempt = self._streaming
        return attempt.finish if not attempt.tokens else None

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to ask `next` for."""
        attempt = self._streaming
        return attempt.done and not attempt.tokens and attempt.error is None

    @property
    def _streaming(self) -> Attempt:
        assert self._attempt is not None
        return self._attempt

    async def start(self) -> None:
        """Return when the first tokens are there. Raises KvmeshError; nothing is left running then."""
        if self.call.charge is not None:
            await self.call.charge.reserve()
        self._first = await self._begin(self.call, [])
        if self._first.first_at:
            self._metrics.ttft.observe(self._first.first_at - self.call.received)

    async def next(self, take: Take | None = None) -> Output:
        """What has come since the last call, at least one token unless the answer is complete or interrupted.

        While it waits, new tokens are offered to `take`, on the event loop but outside of the task, where
        they come up; those that it returns True for are not returned here.
        Raises KvmeshError when the answer cannot be completed.
        """
        self._taker = take
        attempt = self._streaming
        if not attempt.tokens:
            await attempt.changed(self._take if take is not None else None)
        output = attempt.take()
        while not output.token_ids:
            if attempt.error is None:
                return output
            attempt = await self._go_on(attempt.error, attempt.failed_worker)
            output = attempt.take()
        self._note(attempt, output.token_ids)
        return output

    def interrupt(self) -> None:
        """Let `next` return what there is, be it nothing."""
        self._streaming.interrupt()

    def _take(self, tokens: Sequence[int]) -> bool:
        assert self._taker is not None
        try:
            if not self._taker(tokens):
                return False
        except Exception:
            # Steps of other requests come behind this one's, on the same stack.
            log.exception("answer broken off", request_id=self.call.request_id)
            self.abort(KvmeshError(ErrorCode.ERROR_CODE_INTERNAL, "internal error; see the frontend's log"))
        else:
            self._note(self._streaming, tokens)
        return True

    def _note(self, attempt: Attempt, tokens: Sequence[int]) -> None:
        """They are the client's from now on."""
        count = len(tokens)
        self.output_tokens += count
        self._continuation.add(tokens)
        if attempt.routed.lease is not None:
            attempt.routed.lease.output_tokens = self.output_tokens - self._before
        now = time.monotonic()
        if self._last_at:
            self._metrics.itl.observe((now - self._last_at) / count)
        self._last_at = now

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
        # It holds who reads this session: the two go when they are done, not when a collection finds them.
        self._taker = None
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

    async def _begin(self, call: Call, excluded: list[str], patience_s: float = 0.0) -> Attempt:
        """The attempt that has first tokens of `call`, or the answer's end. Raises KvmeshError.

        For `patience_s` it waits for workers to come, where none is left.
        """
        failure: KvmeshError | None = None
        give_up, left = time.monotonic() + patience_s, _MAX_ATTEMPTS
        while left:
            self._check()
            patient = time.monotonic() < give_up
            attempt = await self._place(call, excluded, failure, patient)
            if attempt is None:
                left -= not patient
                await asyncio.sleep(_RETRY_PAUSE_S)
                continue
            left -= 1
            await attempt.changed()
            failure = attempt.error
            if failure is None:
                return attempt
            if attempt.begun and self._continuation.possible and _helps_elsewhere(failure):
                # They came together: the tokens are good, and `next` goes on from them.
                return attempt
            self._note_lost(attempt)
            self._end_attempt()
            if not _helps_elsewhere(failure):
                break
            self._note_failure("trying elsewhere", failure, attempt.failed_worker)
            excluded.append(attempt.failed_worker)
            # What was placed in time is not refused for being late.
            call = replace(call, first_by=None)
        self._check()
        assert failure is not None
        # Where the client wrote it.
        failure.param = self.call.params.get(failure.param or "", failure.param)
        failure.retry_after_ms = failure.retry_after_ms or (1_000 if failure.retryable else 0)
        raise failure

    async def _go_on(self, failure: KvmeshError, worker: str) -> Attempt:
        """The attempt that goes on with the answer of a lost worker. Raises `failure` where none can."""
        self._check()
        rest = self._continuation.rest()
        if rest is None or len(self.continued_on) == _MAX_CONTINUATIONS or not _helps_elsewhere(failure):
            raise failure
        self._note_lost(self._streaming)
        self._end_attempt()
        self._note_failure("going on elsewhere", failure, worker)
        self._before = self.output_tokens
        try:
            attempt = await self._begin(rest, [worker], self._mesh.recovery_s)
        except KvmeshError as error:
            self._check()
            # What went wrong at first says more than that nobody could take over.
            raise failure from error
        self.continued_on.append(attempt.routed.placement.decode.id)
        self._metrics.continuations.inc()
        return attempt

    def _note_lost(self, attempt: Attempt) -> None:
        placement = attempt.routed.placement
        for worker in (placement.decode, placement.prefill):
            if attempt.lost_worker and worker.id == attempt.lost_worker:
                self._lost[worker.id, worker.incarnation] = time.monotonic() + self._mesh.listed_s

    def _note_failure(self, what: str, failure: KvmeshError, worker: str) -> None:
        reason = ErrorCode.Name(failure.code).removeprefix("ERROR_CODE_").lower()
        self._metrics.retries.labels(reason).inc()
        log.info(what, request_id=self.call.request_id, worker=worker, error=failure.message)

    async def _place(
        self, call: Call, excluded: list[str], failure: KvmeshError | None, patient: bool
    ) -> Attempt | None:
        """Start an attempt. None: nobody is left but those that failed, and one more look is worth it;
        `excluded` says whom that leaves out."""
        begun = time.perf_counter()
        try:
            routed = await self._mesh.placer.place(call, excluded)
        except KvmeshError as error:
            if error.code == ErrorCode.ERROR_CODE_NO_WORKER_READY and (excluded or patient):
                excluded.clear()
                return None
            # What went wrong at first says more than that nobody is left.
            raise failure or error from None
        finally:
            self.route_ms += (time.perf_counter() - begun) * 1000
        placement = routed.placement
        if patient and (lost := self._lost_of(placement)):
            # Still listed, and it looks idle: others are asked first the next time.
            excluded += lost
            if routed.lease is not None:
                routed.lease.end()
            return None
        attempt = self._attempt = Attempt(routed)
        self._check()
        split = placement.HasField("prefill")
        attempt.start(
            self._engine_request(call, attempt),
            packed_field(EngineRequest.TOKEN_IDS_FIELD_NUMBER, call.token_ids),
            self._mesh.link(placement.decode, prefill=False),
            self._mesh.link(placement.prefill, prefill=True) if split else None,
        )
        return attempt

    def _lost_of(self, placement: Placement) -> list[str]:
        # One that is listed for longer is there, whatever was taken for its loss.
        now, workers = time.monotonic(), (placement.decode, placement.prefill)
        return [w.id for w in workers if now < self._lost.get((w.id, w.incarnation), 0.0)]

    def _engine_request(self, call: Call, attempt: Attempt) -> EngineRequest:
        """Without the prompt."""
        placement = attempt.routed.placement
        return EngineRequest(
            request_id=call.request_id,
            sampling=call.sampling,
            bootstrap=placement.bootstrap if placement.HasField("bootstrap") else None,
            priority=call.priority,
            cache_salt=call.cache_salt,
            adapter=call.model.adapter,
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
        for tier, tokens in self.attempt.cached.ListFields():
            self._metrics.cached_by_tier[tier.name].inc(tokens)

    def _settle(self, charge: Charge) -> None:
        charge.settle(
            started=self.started,
            output_tokens=self.output_tokens,
            cached=self.attempt.cached if self.started else CachedTokens(),
            reasoning_tokens=self.reasoning_tokens,
        )


def _helps_elsewhere(failure: KvmeshError) -> bool:
    return failure.retryable and failure.code not in _FINAL
