"""SGLang's server arguments for one engine: kvmesh's defaults under what the configuration says.

Runs in the launcher, where SGLang is imported anyway.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from sglang.srt.arg_groups.arg_utils import record_fields
from sglang.srt.server_args import ServerArgs

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.engine.sglang.spec import EngineSpec
from kvmesh.v1.errors_pb2 import ErrorCode

# Enough KV for a few conversations of the whole context, without taking the host's memory.
_CPU_TOKENS_LEAST, _CPU_TOKENS_MOST = 16_384, 65_536
# A chunk cannot be aborted once begun: under a second of a small model's prefill, in float32 on one core.
_CPU_CHUNK = 512
_CPU_REQUESTS = 128
# Our level -> SGLang's: it logs every batch at info.
_LOG_LEVELS = {"debug": "info", "info": "warning", "warning": "warning", "error": "error"}


def server_arguments(spec: EngineSpec) -> dict[str, Any]:
    """All arguments by SGLang's names. Raises KvmeshError(INVALID_ARGUMENT) for one SGLang does not know."""
    arguments: dict[str, Any] = {
        "model_path": spec.model_path,
        "page_size": spec.page_size,
        "dtype": spec.dtype,
        "host": spec.host,
        "log_level": _LOG_LEVELS[spec.log_level],
        "skip_tokenizer_init": True,
        "sleep_on_idle": True,
        # Free to choose white space, a small model writes it until its answer is full.
        "constrained_json_disable_any_whitespace": True,
        "kv_events_config": _kv_events(spec.directory),
        # Every change of the load is published; tests and routers read it at once.
        "load_snapshot_publish_interval": 1,
    }
    if spec.context_length is not None:
        arguments["context_length"] = spec.context_length
    if spec.role != "aggregated":
        arguments |= {"disaggregation_mode": spec.role, "disaggregation_transfer_backend": "nixl"}
    if spec.role == "prefill":
        arguments["disaggregation_bootstrap_port"] = spec.bootstrap_port
    if spec.role == "decode":
        # The default backs retracted requests up in pinned memory, which needs CUDA, and caches nothing.
        arguments["disaggregation_decode_enable_radix_cache"] = True
    if not torch.cuda.is_available():
        arguments |= _cpu_arguments(spec.context_length)
    if spec.task == "embed":
        # A prompt is one pass: what later tokens change in earlier ones, or are pooled with, is not cached.
        arguments |= {"is_embedding": True, "disable_radix_cache": True, "chunked_prefill_size": -1}
        if not torch.cuda.is_available():
            # Of what is left of the memory; SGLang's own guess, for passes of any length, is less than none.
            arguments["mem_fraction_static"] = 0.5
    elif spec.kvbm_socket is not None:
        from kvmesh.engine.sglang.linker import linker_server_args

        given = {"model": spec.model_name} if spec.model_name else {}
        arguments |= linker_server_args(spec.kvbm_socket, spec.worker_id, given)
    for configured in spec.arguments:
        arguments |= {name.replace("-", "_"): value for name, value in configured.items()}
    _refuse_unknown(arguments)
    if arguments.get("dp_size", 1) != 1:
        raise KvmeshError(
            ErrorCode.ERROR_CODE_UNSUPPORTED,
            "dp_size of an engine must be 1; run one worker for each data-parallel rank instead",
        )
    return arguments


def _cpu_arguments(context_length: int | None) -> dict[str, Any]:
    wanted = 2 * (context_length or 0)
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        # Steps run one after the other on a CPU; overlapping them only delays results by one step.
        "disable_overlap_schedule": True,
        "max_total_tokens": min(_CPU_TOKENS_MOST, max(_CPU_TOKENS_LEAST, wanted)),
        "max_running_requests": _CPU_REQUESTS,
        "chunked_prefill_size": _CPU_CHUNK,
    }


def _kv_events(directory: str) -> str:
    return (
        f'{{"publisher": "zmq", "topic": "kv", "endpoint": "ipc://{directory}/events", '
        f'"replay_endpoint": "ipc://{directory}/replay"}}'
    )


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    known = {field.name for field in record_fields(ServerArgs)}
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else "; see SGLang's server arguments"
            raise invalid(f"unknown SGLang argument `{name}` in `engine.args`{hint}")
