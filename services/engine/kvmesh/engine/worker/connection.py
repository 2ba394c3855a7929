"""One caller's stream: all its requests one way, one message an engine step the other way.

The engine calls `_on_step` for every step and never waits. A reader that keeps up gets a message a step; for
one that is behind steps are merged, request by request, into the message it gets next, up to a bound beyond
which the stream is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.grpc.streams import Stream
from kvmesh.common.metrics import WorkerMetrics
from kvmesh.engine.contract import Engine, Finish, FinishReason, StepOutput
from kvmesh.engine.worker.live import LiveRequest
from kvmesh.engine.worker.wire import read_request, write_finish, write_step
from kvmesh.v1 import engine_pb2
from kvmesh.v1.errors_pb2 import ErrorCode

# Tokens and steps merged for a reader that does not read; a few megabytes.
MAX_BUFFERED = 1 << 18

Command = type[engine_pb2.GenerateRequest] | type[engine_pb2.PrefillRequest]
Response = type[engine_pb2.GenerateResponse] | type[engine_pb2.PrefillResponse]


class Connection:
    """The handler of one stream. However the stream ends, none of its requests is left in the engine."""

    def __init__(
        self,
        stream: Stream,
        engine: Callable[[], Engine],
        command: Command,
        response: Response,
        method: str,
        metrics: WorkerMetrics,
        on_closed: Callable[[Connection], None],
    ) -> None:
        """`engine` gives the engine to submit to, or raises the reason why none takes requests now."""
        self._stream = stream
        self._engine = engine
        self._command = command
        self._response = response
        self._method = method
        self._metrics = metrics
        self._on_closed = on_closed
        self._by_id: dict[int, LiveRequest] = {}
        self._by_handle: dict[int, LiveRequest] = {}
        # The next message, None while there is nothing to send, and its steps by request id.
        self._message: Any = None
        self._steps: dict[int, engine_pb2.RequestStep] = {}
        self._buffered = 0
        self._writable = True
        # No more commands will come: the stream ends with its last request.
        self._complete = False

    @property
    def live(self) -> int:
        return len(self._by_id)

    @property
    def settled(self) -> bool:
        """Nothing runs and everything has been sent."""
        return not self._by_id and self._message is None

    def on_message(self, message: bytes) -> None:
        try:
            command = self._command.FromString(message)
        except DecodeError:
            raise invalid(f"the message is not a {self._command.DESCRIPTOR.name}") from None
        match command.WhichOneof("command"):
            case "start":
                self._start(command.start)
            case "cancel":
                self._cancel(command.cancel.id)
            case _:
                # A newer caller's command. Ignoring it is what additive messages ask for.
                pass

    def on_half_close(self) -> None:
        self.complete()

    def on_writable(self) -> None:
        self._writable = True
        self._send()

    def on_closed(self, error: KvmeshError | None) -> None:
        """Abort what is live and drop its outputs."""
        for live in self._by_handle.values():
            live.end()
            self._count(FinishReason.CANCELLED)
            live.engine.abort(live.handle)
        self._by_id.clear()
        self._by_handle.clear()
        self._message = None
        self._steps = {}
        self._on_closed(self)

    def complete(self) -> None:
        """Take no more commands and end the stream after its last request; those under way go on."""
        self._complete = True
        self._send()

    def abort_all(self, why: KvmeshError) -> None:
        """End every request with an ERROR finish."""
        for live in list(self._by_id.values()):
            self._abort(live, why)

    def _start(self, message: engine_pb2.EngineRequest) -> None:
        previous = self._by_id.get(message.id)
        if previous is not None:
            # Which of the two a step belongs to could not be told, so neither goes on.
            self._abort(previous, invalid(f"request id {message.id} was used twice on one stream", "id"))
            return
        live = LiveRequest(message.id, self._method, message.traceparent, message.request_id)
        try:
            engine = self._engine()
            live.handle = live.context.run(engine.submit, read_request(message), self._on_step)
        except KvmeshError as error:
            live.end(error)
            self._count(FinishReason.ERROR)
            step = self._step(message.id)
            step.finish.CopyFrom(write_finish(Finish(FinishReason.ERROR, error=error)))
            self._grew(1)
            self._send()
            return
        live.engine = engine
        self._by_id[message.id] = live
        self._by_handle[live.handle] = live
        if message.timeout_ms:
            live.deadline = asyncio.get_running_loop().call_later(
                message.timeout_ms / 1000, self._expire, live, message.timeout_ms
            )

    def _cancel(self, request_id: int) -> None:
        # An unknown one has just finished.
        live = self._by_id.get(request_id)
        if live is not None:
            live.engine.abort(live.handle)

    def _expire(self, live: LiveRequest, timeout_ms: int) -> None:
        message = f"the request did not finish within {timeout_ms} ms"
        self._abort(live, KvmeshError(ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED, message))

    def _abort(self, live: LiveRequest, why: KvmeshError) -> None:
        live.override = live.override or why
        live.engine.abort(live.handle)

    def _on_step(self, outputs: list[StepOutput]) -> None:
        # Runs for every token: no logging, no tasks, nothing that waits.
        by_handle = self._by_handle
        steps = self._steps
        message = self._message
        if message is None:
            message = self._message = self._response()
        add = message.steps.add
        for output in outputs:
            live = by_handle.get(output.handle)
            if live is None:
                continue
            step = steps.get(live.id)
            if step is not None:
                write_step(step, output)
            elif (
                output.finish is None
                and output.cached is None
                and output.timing is None
                and not output.logprobs
            ):
                steps[live.id] = add(id=live.id, token_ids=output.token_ids)
                continue
            else:
                step = steps[live.id] = add(id=live.id)
                write_step(step, output)
            if output.cached is not None or output.timing is not None:
                live.note(output.cached, output.timing)
            if output.finish is not None:
                self._finish(live, output.finish, step)
            if output.cached is not None:
                self._count_cached(output)
        if not steps:
            self._message = None
        elif not self._writable:
            self._grew(sum(len(output.token_ids) for output in outputs) + len(outputs))
        else:
            self._send()

    def _finish(self, live: LiveRequest, finish: Finish, step: engine_pb2.RequestStep) -> None:
        del self._by_id[live.id]
        del self._by_handle[live.handle]
        if live.override is not None and finish.reason is FinishReason.CANCELLED:
            finish = Finish(FinishReason.ERROR, error=live.override)
            step.finish.CopyFrom(write_finish(finish))
        live.end(finish.error)
        self._count(finish.reason)

    def _step(self, request_id: int) -> engine_pb2.RequestStep:
        """The request's entry in the next message."""
        if self._message is None:
            self._message = self._response()
        step = self._steps.get(request_id)
        if step is None:
            step = self._steps[request_id] = self._message.steps.add(id=request_id)
        return step

    def _send(self) -> None:
        """Send the message there is, unless the reader is behind, and the end when it was the last."""
        if not self._writable:
            return
        message = self._message
        if message is not None:
            self._message = None
            self._steps = {}
            self._buffered = 0
            self._writable = self._stream.send(message.SerializeToString())
        if self._complete and not self._by_id:
            self._stream.end()

    def _grew(self, amount: int) -> None:
        self._buffered += amount
        if self._buffered > MAX_BUFFERED:
            message = "the stream was not read for too long; open a new one and read it"
            self._stream.fail(KvmeshError(ErrorCode.ERROR_CODE_OVERLOADED, message))

    def _count(self, reason: FinishReason) -> None:
        self._metrics.finished.labels(reason.value).inc()

    def _count_cached(self, output: StepOutput) -> None:
        assert output.cached is not None
        for tier in ("device", "host", "nvme", "network"):
            tokens = getattr(output.cached, tier)
            if tokens:
                self._metrics.cached_tokens.labels(tier).inc(tokens)
