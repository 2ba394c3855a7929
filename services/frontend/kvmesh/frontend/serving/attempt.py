"""A request on one placement: its halves are started together, and cancelled together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.mesh.link import Link
from kvmesh.frontend.mesh.placement import Routed
from kvmesh.v1.common_pb2 import CachedTokens
from kvmesh.v1.engine_pb2 import (
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    EngineRequest,
    EngineTiming,
    Finish,
    RequestStep,
    TokenLogprob,
)
from kvmesh.v1.errors_pb2 import ErrorCode

# An answer that is complete waits this long at most for the prefill worker's last word on it.
_PREFILL_GRACE_S = 0.5


class Output(NamedTuple):
    """New tokens and, where asked for, what each was worth."""

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob]


# Takes new tokens where they come up, or returns False: then they wait for the task.
Take = Callable[[Sequence[int]], bool]


class Attempt:
    """Gathers what both halves send. One task waits on it; steps come in by the links' callbacks."""

    def __init__(self, routed: Routed) -> None:
        self.routed = routed
        # Not yet taken by `take`; with a log probability each where asked for.
        self.tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        # Of the prompt's tokens but the first, where asked for; complete once there are tokens to take.
        self.prompt_logprobs: Sequence[TokenLogprob] = ()
        # The prompt's vector, from a model that embeds.
        self.embedding: Sequence[float] = ()
        # As soon as the last tokens are there, before `done`.
        self.finish: Finish | None = None
        # Nothing more will come: finished, or failed with `error` because of `failed_worker`.
        self.done = False
        self.error: KvmeshError | None = None
        self.failed_worker = ""
        # The one that is not there any more, if that is why.
        self.lost_worker = ""
        # `time.monotonic` of the first token, or of the vector.
        self.first_at = 0.0
        self.generate_timing = EngineTiming()
        self._generate_cached = CachedTokens()
        self._prefill: _PrefillHalf | None = None
        self._link: Link | None = None
        self._id = 0
        self._awaits_prompt = False
        self._grace: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        # Set while the task waits for more of an answer that has begun.
        self._taker: Take | None = None

    def start(self, request: EngineRequest, prompt: bytes, generate: Link, prefill: Link | None) -> None:
        """Hand the request to one aggregated worker, or to both halves; `prompt` is as for `Link.start`."""
        self._link = generate
        if prefill is not None:
            other = EngineRequest()
            other.CopyFrom(request)
            self._prefill = _PrefillHalf(self, prefill)
            # They come from the other half, perhaps later than the first token.
            self._awaits_prompt = request.sampling.prompt_logprobs
            self._prefill.start(other, prompt)
        self._id = generate.start(request, prompt, self)

    @property
    def begun(self) -> bool:
        """Whether there are tokens to take, and all that has to be shown before them."""
        return bool(self.tokens) and not self._awaits_prompt

    @property
    def cached(self) -> CachedTokens:
        """Prompt tokens that were not computed, as far as known."""
        return self._prefill.cached if self._prefill else self._generate_cached

    @property
    def prefill_timing(self) -> EngineTiming:
        """Timing of the worker that computed the prompt."""
        return self._prefill.timing if self._prefill else self.generate_timing

    async def changed(self, take: Take | None = None) -> None:
        """Return once there are tokens to take, the attempt is done, or `interrupt` was called.

        What comes meanwhile goes to `take` first: tokens that nothing else comes with and that it accepts do
        not wake the task.
        """
        if not self._ready():
            self._waiter, self._taker = asyncio.get_running_loop().create_future(), take
            try:
                await self._waiter
            finally:
                self._taker = None

    def interrupt(self) -> None:
        """Let `changed` return though nothing is there."""
        self._taker = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take(self) -> Output:
        """What has come since the last call."""
        output = Output(self.tokens, self._logprobs)
        self.tokens, self._logprobs = [], []
        return output

    def fail(self, error: KvmeshError, worker: str = "") -> None:
        """End with an error unless already over; cancels what runs."""
        if not self.done:
            self.error = error
            self.failed_worker = worker
            self._complete()

    def lost(self, error: KvmeshError, worker: str) -> None:
        """Fail because a worker is not there any more."""
        self.lost_worker = worker
        self.fail(error, worker)

    def reported(self, finish: Finish, worker: str) -> None:
        """Fail with what a worker says of its half."""
        error, placement = finish_error(finish, worker), self.routed.placement
        if finish.HasField("error") and error.code == ErrorCode.ERROR_CODE_WORKER_LOST and not self.first_at:
            # Who says that one was lost is there itself: it has lost the other half.
            halves = (placement.decode.id, placement.prefill.id)
            self.lost_worker = next((half for half in halves if half not in ("", worker)), "")
        self.fail(error, worker)

    def cancel(self) -> None:
        """Stop both engines' work on it; idempotent."""
        self._complete()

    def on_tokens(self, token_ids: Sequence[int]) -> None:
        if not self.first_at:
            self._came()
        # What came before goes first.
        if self._taker is None or self.tokens or not self._taker(token_ids):
            self.tokens.extend(token_ids)
            self._wake()

    def on_step(self, step: RequestStep) -> None:
        if step.token_ids:
            self._came()
            if not self._hand_over(step):
                self.tokens.extend(step.token_ids)
                self._logprobs.extend(step.logprobs)
        if step.embedding:
            self._came()
            self.embedding = step.embedding
        if step.prompt_logprobs:
            self.prompt_logprobs = step.prompt_logprobs
        if step.HasField("cached"):
            self._generate_cached = step.cached
        if step.HasField("timing"):
            self.generate_timing = step.timing
        if step.HasField("finish"):
            self._id = 0
            self._on_finish(step.finish)
        self._wake()

    def _hand_over(self, step: RequestStep) -> bool:
        # What came before goes first, and an answer's end is the task's to see.
        if self._taker is None or self.tokens or step.logprobs or step.HasField("finish"):
            return False
        return self._taker(step.token_ids)

    def on_lost(self, error: KvmeshError) -> None:
        self._id = 0
        self.lost(error, self.routed.placement.decode.id)

    def prompt_scored(self, logprobs: Sequence[TokenLogprob]) -> None:
        """The prefill half's log probabilities of the prompt."""
        self.prompt_logprobs = logprobs
        self._awaits_prompt = False
        self._wake()

    def prefill_over(self) -> None:
        """The prefill half has had its last step."""
        self._awaits_prompt = False
        if self.finish is not None:
            self._complete()

    def _came(self) -> None:
        """What was asked for begins to come."""
        if not self.first_at:
            self.first_at = time.monotonic()
            if self.routed.lease:
                self.routed.lease.first_token()

    def _on_finish(self, finish: Finish) -> None:
        if finish.reason not in (FINISH_REASON_STOP, FINISH_REASON_LENGTH):
            self.reported(finish, self.routed.placement.decode.id)
            return
        self.finish = finish
        if self._prefill is None or self._prefill.over:
            self._complete()
        elif not self._awaits_prompt:
            self._grace = asyncio.get_running_loop().call_later(_PREFILL_GRACE_S, self._complete)

    def _complete(self) -> None:
        self.done = True
        if self._grace is not None:
            self._grace.cancel()
        if self._id and self._link is not None:
            self._link.cancel(self._id)
            self._id = 0
        if self._prefill is not None:
            self._prefill.cancel()
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done() and self._ready():
            waiter.set_result(None)

    def _ready(self) -> bool:
        return self.done or self.begun


class _PrefillHalf:
    """The prompt's computation on a prefill worker. Its token is dropped: the decode worker sends it, too."""

    __slots__ = ("_attempt", "_id", "_link", "cached", "over", "timing")

    def __init__(self, attempt: Attempt, link: Link) -> None:
        self._attempt = attempt
        self._link = link
        self._id = 0
        self.over = False
        self.cached = CachedTokens()
        self.timing = EngineTiming()

    def start(self, request: EngineRequest, prompt: bytes) -> None:
        self._id = self._link.start(request, prompt, self)

    def cancel(self) -> None:
        if not self.over:
            self.over = True
            self._link.cancel(self._id)

    def on_tokens(self, token_ids: Sequence[int]) -> None:
        """Its token is the other half's to send."""

    def on_step(self, step: RequestStep) -> None:
        if step.HasField("cached"):
            self.cached = step.cached
        if step.HasField("timing"):
            self.timing = step.timing
        if step.prompt_logprobs:
            self._attempt.prompt_scored(step.prompt_logprobs)
        if not step.HasField("finish"):
            return
        self.over = True
        if step.finish.reason in (FINISH_REASON_STOP, FINISH_REASON_LENGTH):
            if self._attempt.routed.lease:
                self._attempt.routed.lease.prefill_done(self.timing.transfer_ms)
        elif not self._attempt.first_at:
            self._attempt.reported(step.finish, self._link.worker_id)
        self._attempt.prefill_over()

    def on_lost(self, error: KvmeshError) -> None:
        self.over = True
        # After the first token the KV has been handed over, and the answer goes on without this worker.
        if not self._attempt.first_at:
            self._attempt.lost(error, self._link.worker_id)
        self._attempt.prefill_over()


def finish_error(finish: Finish, worker: str) -> KvmeshError:
    """Why a worker ended a request that nobody asked it to end."""
    if finish.reason == FINISH_REASON_ERROR and finish.HasField("error"):
        return KvmeshError.from_proto(finish.error)
    return KvmeshError(ErrorCode.ERROR_CODE_WORKER_LOST, f"worker {worker} gave the request up")
