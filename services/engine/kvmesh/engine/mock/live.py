"""One request inside the mock engine."""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.engine.contract import EngineRequest, Finish, StepOutput, StepSink, Timing
from kvmesh.engine.mock.blocks import Allocation
from kvmesh.engine.mock.tokens import TokenSource


class LiveRequest:
    """A request from `submit` to its finish; `allocation` is None while it holds no blocks."""

    __slots__ = (
        "allocation",
        "cached",
        "chain",
        "computed",
        "finished",
        "handle",
        "limit",
        "output",
        "prefill_s",
        "reported",
        "request",
        "sink",
        "source",
        "started_at",
        "submitted_at",
        "transfer_bytes",
        "transfer_s",
    )

    def __init__(
        self,
        handle: int,
        request: EngineRequest,
        sink: StepSink,
        source: TokenSource,
        limit: int,
        submitted_at: float,
    ) -> None:
        self.handle = handle
        self.request = request
        self.sink = sink
        self.source = source
        # Output tokens at most.
        self.limit = limit
        self.output: list[int] = []
        self.allocation: Allocation | None = None
        # Hashes of the whole pages of `tokens`, as far as computed.
        self.chain: list[int] = []
        # Prompt tokens found in the cache; of the first prefill.
        self.cached = 0
        # Leading tokens whose KV exists.
        self.computed = 0
        self.submitted_at = submitted_at
        self.started_at: float | None = None
        self.prefill_s = 0.0
        self.transfer_s = 0.0
        self.transfer_bytes = 0
        # The first output has gone out.
        self.reported = False
        self.finished: Finish | None = None

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and output so far; a copy once there is output."""
        return [*self.request.token_ids, *self.output] if self.output else self.request.token_ids

    def __len__(self) -> int:
        """How many `tokens` there are."""
        return len(self.request.token_ids) + len(self.output)

    def timing(self) -> Timing:
        waited = (self.started_at - self.submitted_at) if self.started_at is not None else 0.0
        return Timing(
            queue_ms=waited * 1000,
            prefill_ms=self.prefill_s * 1000,
            transfer_ms=self.transfer_s * 1000,
            transfer_bytes=self.transfer_bytes,
        )


# What a step gave each request, by the sink that takes it.
Outputs = dict[StepSink, list[StepOutput]]
