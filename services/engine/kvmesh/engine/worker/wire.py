"""Between engine.proto and the Engine contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvmesh.engine.contract import (
    Bootstrap,
    CachedTokens,
    Constraint,
    ConstraintKind,
    EngineLoad,
    EngineRequest,
    Finish,
    FinishReason,
    Logprob,
    Probe,
    Sampling,
    StepOutput,
    Timing,
)
from kvmesh.v1 import common_pb2, engine_pb2

_OPTIONAL = tuple(
    field.name
    for field in engine_pb2.SamplingParams.DESCRIPTOR.fields
    if field.has_presence and not field.message_type and field.name in Sampling.__dataclass_fields__
)
_REASONS = {
    FinishReason.STOP: engine_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: engine_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: engine_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: engine_pb2.FINISH_REASON_ERROR,
}


def read_request(message: engine_pb2.EngineRequest) -> EngineRequest:
    bootstrap = None
    if message.HasField("bootstrap"):
        meeting = message.bootstrap
        bootstrap = Bootstrap(meeting.host, meeting.port, meeting.room)
    return EngineRequest(
        request_id=message.request_id,
        token_ids=message.token_ids[:],
        sampling=read_sampling(message.sampling),
        bootstrap=bootstrap,
        cache_salt=message.cache_salt,
        priority=message.priority,
        adapter=message.adapter,
    )


def read_sampling(message: engine_pb2.SamplingParams) -> Sampling:
    given = {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    constraint = None
    if kind := message.constraint.WhichOneof("kind"):
        constraint = Constraint(ConstraintKind(kind), getattr(message.constraint, kind))
    return Sampling(
        **given,
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=dict(message.logit_bias),
        constraint=constraint,
    )


def write_step(step: engine_pb2.RequestStep, output: StepOutput) -> None:
    """Add `output` to a step that may hold earlier ones of the same request."""
    step.token_ids.extend(output.token_ids)
    _write_logprobs(step.logprobs, output.logprobs)
    _write_logprobs(step.prompt_logprobs, output.prompt_logprobs)
    if output.cached is not None:
        step.cached.CopyFrom(write_cached(output.cached))
    step.embedding.extend(output.embedding)
    if output.timing is not None:
        step.timing.CopyFrom(write_timing(output.timing))
    if output.finish is not None:
        step.finish.CopyFrom(write_finish(output.finish))


def _write_logprobs(into: Any, logprobs: Sequence[Logprob]) -> None:
    for one in logprobs:
        ids, values = zip(*one.top, strict=True) if one.top else ((), ())
        into.add(logprob=one.logprob, top_ids=ids, top_logprobs=values)


def write_finish(finish: Finish) -> engine_pb2.Finish:
    return engine_pb2.Finish(
        reason=_REASONS[finish.reason],
        matched_token_id=finish.matched_token_id,
        error=finish.error.to_proto() if finish.error is not None else None,
    )


def write_cached(cached: CachedTokens) -> common_pb2.CachedTokens:
    return common_pb2.CachedTokens(
        device=cached.device, host=cached.host, nvme=cached.nvme, network=cached.network
    )


def write_timing(timing: Timing) -> engine_pb2.EngineTiming:
    return engine_pb2.EngineTiming(
        queue_ms=timing.queue_ms,
        prefill_ms=timing.prefill_ms,
        transfer_ms=timing.transfer_ms,
        transfer_bytes=timing.transfer_bytes,
        load_ms=timing.load_ms,
    )


def write_load(load: EngineLoad) -> common_pb2.WorkerLoad:
    return common_pb2.WorkerLoad(
        requests=load.requests,
        queued_requests=load.queued_requests,
        blocks_used=load.blocks_used,
        blocks_cached=load.blocks_cached,
        transfers=load.transfers,
        prompt_tokens_total=load.prompt_tokens_total,
        output_tokens_total=load.output_tokens_total,
        transferred_bytes_total=load.transferred_bytes_total,
    )


def write_probe(probe: Probe) -> common_pb2.Probe:
    return common_pb2.Probe(
        prefill=[common_pb2.PrefillTime(tokens=tokens, ms=ms) for tokens, ms in probe.prefill],
        decode=[
            common_pb2.StepTime(streams=streams, pool_share=share, ms=ms)
            for streams, share, ms in probe.decode
        ],
        transfer=[common_pb2.TransferTime(tokens=tokens, ms=ms) for tokens, ms in probe.transfer],
    )
