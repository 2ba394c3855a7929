"""One long-lived stream to one worker, shared by all requests of this process that run there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import structlog

from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.streams import StreamHub
from kvmesh.core import read_steps
from kvmesh.v1.engine_pb2 import (
    CancelRequest,
    EngineRequest,
    GenerateRequest,
    PrefillRequest,
    RequestStep,
)
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

# Protobuf's wire type of a message within a message.
_DELIMITED = 2


class StepSink(Protocol):
    """Who started a request on a link. All are called on the event loop and must not block or raise."""

    def on_tokens(self, token_ids: Sequence[int]) -> None:
        """An engine step that gave the request tokens and nothing else, as most do."""
        ...

    def on_step(self, step: RequestStep) -> None:
        """Any other step; the last one has `finish`."""
        ...

    def on_lost(self, error: KvmeshError) -> None:
        """The stream broke; there will be no more steps."""
        ...


class Link:
    """Starts and cancels requests on one worker's `Generate` or `Prefill` stream.

    The stream opens with the link, on a connection of its own. Once it breaks, every request on it is
    told, and `closed` is true for ever: a new link must be made.
    """

    def __init__(self, hub: StreamHub, worker_id: str, address: str, *, prefill: bool) -> None:
        self.worker_id = worker_id
        self._sinks: dict[int, StepSink] = {}
        self._next_id = 0
        self._error: KvmeshError | None = None
        self._on_closed: Callable[[], object] | None = None
        self._command: Any = PrefillRequest if prefill else GenerateRequest
        self._start = _varint(self._command.START_FIELD_NUMBER << 3 | _DELIMITED)
        method = "/kvmesh.v1.PrefillService/Prefill" if prefill else "/kvmesh.v1.DecodeService/Generate"
        self._stream = hub.open(address, method, self)

    @property
    def closed(self) -> bool:
        return self._error is not None

    def __len__(self) -> int:
        """Requests running on the link."""
        return len(self._sinks)

    def when_closed(self, callback: Callable[[], object]) -> None:
        self._on_closed = callback

    def start(self, request: EngineRequest, prompt: bytes, sink: StepSink) -> int:
        """Send a request; sets and returns its id, fresh on this link. The link must not be closed.

        `prompt` is the request's serialized field of token ids, which `request` lacks.
        """
        assert self._error is None, "started on a closed link"
        self._next_id += 1
        request.id = self._next_id
        self._sinks[request.id] = sink
        # As `command(start=request)` is serialized, which would copy the prompt twice.
        started = request.SerializeToString() + prompt
        self._stream.send(self._start + _varint(len(started)) + started)
        return request.id

    def cancel(self, request_id: int) -> None:
        """End a request; its sink hears no more of it. Unknown and finished ones are ignored."""
        if self._sinks.pop(request_id, None) is not None and self._error is None:
            command = self._command(cancel=CancelRequest(id=request_id))
            self._stream.send(command.SerializeToString())

    def close(self) -> None:
        """End the stream, and with it every request on it. Idempotent."""
        if self._error is None:
            self._stream.cancel()
            self._fail(self._lost("the link was closed"))

    def on_message(self, message: bytes) -> None:
        sinks = self._sinks
        for request_id, token_ids, whole in read_steps(message):
            # Without a sink it was cancelled, and this step crossed the cancellation.
            sink = sinks.get(request_id)
            if sink is None:
                continue
            if whole is None:
                sink.on_tokens(token_ids)
                continue
            step = RequestStep.FromString(whole)
            if step.HasField("finish"):
                del sinks[request_id]
            sink.on_step(step)

    def on_half_close(self) -> None:
        """Of served streams only."""

    def on_writable(self) -> None:
        """Commands are few and small: they are queued, however slow the worker reads."""

    def on_closed(self, error: KvmeshError | None) -> None:
        if error is None:
            error = self._lost("it closed the connection")
        elif error.code == ErrorCode.ERROR_CODE_UNAVAILABLE:
            error = self._lost(error.message)
        self._fail(error)

    def _fail(self, error: KvmeshError) -> None:
        self._error = error
        sinks, self._sinks = self._sinks, {}
        if self._on_closed is not None:
            self._on_closed()
        if sinks:
            log.warning("worker lost", worker=self.worker_id, requests=len(sinks), error=error.message)
        for sink in sinks.values():
            sink.on_lost(error)

    def _lost(self, why: str) -> KvmeshError:
        return KvmeshError(ErrorCode.ERROR_CODE_WORKER_LOST, f"worker {self.worker_id} was lost: {why}")


def _varint(value: int) -> bytes:
    """As protobuf writes an integer."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
