"""One caller's stream over a scripted engine: merging for slow readers, ends, bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, cast

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fixtures.waiting import eventually
from kvmesh.common import metrics, telemetry
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.grpc.streams import Stream
from kvmesh.engine.contract import (
    CachedTokens,
    Engine,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    Finish,
    FinishReason,
    KvEvent,
    Probe,
    StepOutput,
    StepSink,
    Timing,
)
from kvmesh.engine.worker import connection as module
from kvmesh.engine.worker.connection import Connection
from kvmesh.v1 import engine_pb2
from kvmesh.v1.engine_pb2 import CancelRequest, GenerateRequest, GenerateResponse
from kvmesh.v1.errors_pb2 import ErrorCode


class ScriptedEngine(Engine):
    """Gives what the test says, when it says it."""

    def __init__(self) -> None:
        self.sinks: dict[int, StepSink] = {}
        self.requests: dict[int, EngineRequest] = {}
        self.aborted: list[int] = []

    def submit(self, request: EngineRequest, sink: StepSink) -> int:
        if not request.token_ids:
            raise invalid("the prompt is empty", "token_ids")
        handle = 100 + len(self.sinks)
        self.sinks[handle] = sink
        self.requests[handle] = request
        return handle

    def step(self, *outputs: StepOutput) -> None:
        """One engine step; all outputs are of one connection."""
        self.sinks[outputs[0].handle](list(outputs))

    def abort(self, handle: int) -> None:
        self.aborted.append(handle)

    async def start(self) -> EngineInfo:
        raise NotImplementedError

    def load(self) -> EngineLoad:
        raise NotImplementedError

    def kv_events(self) -> AsyncGenerator[list[KvEvent], None]:
        raise NotImplementedError

    async def cache_prompt(self, token_ids: Sequence[int], cache_salt: str = "") -> None:
        raise NotImplementedError

    async def probe(self) -> Probe:
        raise NotImplementedError

    async def flush_cache(self) -> None:
        raise NotImplementedError

    async def failed(self) -> KvmeshError:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


class Caller:
    """The other end of a stream, and the stream; does not read while `behind`."""

    def __init__(self) -> None:
        self.engine = ScriptedEngine()
        self.behind = False
        self.received: list[Any] = []
        self.ended = False
        self.failure: KvmeshError | None = None
        self.gone: list[Connection] = []
        self.connection = Connection(
            cast(Stream, self),
            lambda: self.engine,
            GenerateRequest,
            GenerateResponse,
            "generate",
            metrics.worker("aggregated"),
            self.gone.append,
        )

    def send(self, message: bytes) -> bool:
        assert not self.ended
        self.received.append(GenerateResponse.FromString(message))
        return not self.behind

    def end(self) -> None:
        self.ended = True

    def fail(self, error: KvmeshError) -> None:
        self.failure = error
        self.connection.on_closed(error)

    def catch_up(self) -> None:
        self.behind = False
        self.connection.on_writable()

    def command(self, *commands: GenerateRequest) -> None:
        for command in commands:
            self.connection.on_message(command.SerializeToString())

    def steps(self, request_id: int) -> list[engine_pb2.RequestStep]:
        return [step for message in self.received for step in message.steps if step.id == request_id]


@pytest.fixture
async def caller() -> Caller:
    return Caller()


def start(request_id: int, tokens: int = 3, **fields: Any) -> GenerateRequest:
    request = engine_pb2.EngineRequest(id=request_id, token_ids=range(1, tokens + 1), **fields)
    return GenerateRequest(start=request)


def done(handle: int, *tokens: int, reason: FinishReason = FinishReason.LENGTH) -> StepOutput:
    return StepOutput(handle, tokens, Finish(reason), timing=Timing(1.0, 2.0, 3.0, 4, 0.5))


async def test_a_step_is_a_message(caller: Caller) -> None:
    caller.command(start(1), start(2))
    caller.engine.step(StepOutput(100, (7,), cached=CachedTokens(3, 2, 1)), StepOutput(101, (8, 9)))
    assert len(caller.received) == 1
    caller.engine.step(StepOutput(100, (10,)), done(101, 11))
    assert len(caller.received) == 2
    assert [list(step.token_ids) for step in caller.steps(1)] == [[7], [10]]
    assert [list(step.token_ids) for step in caller.steps(2)] == [[8, 9], [11]]
    cached = caller.steps(1)[0].cached
    assert (cached.device, cached.host, cached.nvme, cached.network) == (3, 2, 1, 0)
    last = caller.steps(2)[1]
    assert last.finish.reason == engine_pb2.FINISH_REASON_LENGTH
    assert (last.timing.queue_ms, last.timing.transfer_bytes) == (1.0, 4)
    assert caller.connection.live == 1


async def test_the_span_says_what_came_from_where_and_how_long_it_took(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer("test"))
    caller.command(start(1))
    timing = Timing(1.0, 2.0, load_ms=0.5)
    caller.engine.step(StepOutput(100, (7,), cached=CachedTokens(3, 2, 1), timing=timing))
    caller.engine.step(done(100, 8))
    (span,) = exporter.get_finished_spans()
    said = dict(span.attributes or {})
    by_tier = {tier: said[f"cached_tokens.{tier}"] for tier in metrics.TIERS}
    assert by_tier == {"device": 3, "host": 2, "nvme": 1, "network": 0}
    # The last report holds.
    assert (said["queue_ms"], said["load_ms"], said["transfer_bytes"]) == (1.0, 0.5, 4)
    assert caller.steps(1)[0].timing.load_ms == 0.5


async def test_steps_merge_while_the_reader_is_slow(caller: Caller) -> None:
    caller.command(start(1), start(2))
    caller.behind = True
    caller.engine.step(StepOutput(100, (1,), cached=CachedTokens()), StepOutput(101, (51,)))
    for token in range(2, 20):
        caller.engine.step(StepOutput(100, (token,)), StepOutput(101, (50 + token,)))
    caller.engine.step(done(101, 70))
    assert len(caller.received) == 1
    caller.catch_up()
    assert len(caller.received) == 2
    assert [list(step.token_ids) for step in caller.steps(1)] == [[1], list(range(2, 20))]
    assert list(caller.steps(2)[1].token_ids) == [*range(52, 70), 70]
    assert caller.steps(2)[1].HasField("finish")


async def test_a_reader_that_never_reads_loses_its_stream(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BUFFERED", 50)
    caller.command(start(1))
    caller.behind = True
    for token in range(100):
        caller.engine.step(StepOutput(100, (token,)))
    assert caller.failure is not None
    assert caller.failure.code == ErrorCode.ERROR_CODE_OVERLOADED
    assert caller.engine.aborted == [100]
    assert caller.gone == [caller.connection]
    caller.catch_up()
    assert len(caller.received) == 1


async def test_refusals_are_steps(caller: Caller) -> None:
    caller.command(start(1, tokens=0), start(2))
    (step,) = caller.steps(1)
    assert step.finish.reason == engine_pb2.FINISH_REASON_ERROR
    assert step.finish.error.code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    assert step.finish.error.param == "token_ids"
    assert caller.connection.live == 1


async def test_cancel_asks_the_engine_and_waits_for_its_finish(caller: Caller) -> None:
    caller.command(start(1), GenerateRequest(cancel=CancelRequest(id=1)))
    assert caller.engine.aborted == [100]
    assert caller.connection.live == 1
    caller.engine.step(done(100, reason=FinishReason.CANCELLED))
    assert caller.steps(1)[0].finish.reason == engine_pb2.FINISH_REASON_CANCELLED
    caller.command(GenerateRequest(cancel=CancelRequest(id=1)))
    assert caller.engine.aborted == [100]


async def test_a_deadline_turns_the_cancellation_into_an_error(caller: Caller) -> None:
    caller.command(start(1, timeout_ms=20), start(2, timeout_ms=20))
    await eventually(lambda: caller.engine.aborted == [100, 101])
    # One was aborted, the other finished just before.
    caller.engine.step(done(100, reason=FinishReason.CANCELLED), done(101, 5, reason=FinishReason.STOP))
    assert caller.steps(1)[0].finish.error.code == ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED
    assert caller.steps(2)[0].finish.reason == engine_pb2.FINISH_REASON_STOP


async def test_a_deadline_ends_with_its_request(caller: Caller) -> None:
    caller.command(start(1, timeout_ms=20))
    caller.engine.step(done(100, 5))
    await asyncio.sleep(0.05)
    assert caller.engine.aborted == []


async def test_closing_aborts_what_is_live_and_drops_the_rest(caller: Caller) -> None:
    caller.command(start(1), start(2), start(3))
    caller.engine.step(done(101, 5))
    caller.connection.on_closed(None)
    assert caller.engine.aborted == [100, 102]
    assert caller.connection.settled
    received = len(caller.received)
    caller.engine.step(done(100, reason=FinishReason.CANCELLED))
    assert len(caller.received) == received
    assert caller.gone == [caller.connection]


async def test_a_half_closed_stream_ends_with_its_last_request(caller: Caller) -> None:
    caller.command(start(1))
    caller.connection.on_half_close()
    caller.behind = True
    caller.engine.step(StepOutput(100, (1,)))
    caller.engine.step(done(100, 2))
    assert not caller.ended
    caller.catch_up()
    assert caller.ended
    assert [list(step.token_ids) for step in caller.steps(1)] == [[1], [2]]


async def test_what_is_no_command_is_refused(caller: Caller) -> None:
    with pytest.raises(KvmeshError) as caught:
        caller.connection.on_message(b"\xff\xff")
    assert caught.value.code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    # A newer caller's command is none of ours, but no error.
    caller.connection.on_message(GenerateRequest().SerializeToString())


async def test_sampling_reaches_the_engine_with_openai_defaults(caller: Caller) -> None:
    sampling = engine_pb2.SamplingParams(temperature=0, max_new_tokens=9, stop_token_ids=[4, 5], seed=0)
    bootstrap = engine_pb2.Bootstrap(host="h", port=9, room=1 << 62)
    caller.command(start(1, sampling=sampling, bootstrap=bootstrap, cache_salt="s", priority=-2), start(2))
    given, default = caller.engine.requests[100], caller.engine.requests[101]
    assert (given.sampling.temperature, given.sampling.seed) == (0.0, 0)
    assert given.sampling.stop_token_ids == (4, 5)
    assert given.sampling.max_new_tokens == 9
    assert given.bootstrap is not None
    assert given.bootstrap.room == 1 << 62
    assert (given.cache_salt, given.priority) == ("s", -2)
    assert default.bootstrap is None
    assert (default.sampling.temperature, default.sampling.top_p, default.sampling.top_k) == (1.0, 1.0, -1)
    assert (default.sampling.max_new_tokens, default.sampling.seed) == (None, None)
