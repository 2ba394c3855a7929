"""What a scheduler tells kvmesh beyond what SGLang reports by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from sglang.srt.disaggregation.utils import DisaggregationMode, get_kv_transfer_buf_infos
from sglang.srt.managers.io_struct import PickleWrapper
from sglang.srt.managers.load_snapshot import LoadSnapshot
from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats

from kvmesh.engine.contract import StoreTraffic
from kvmesh.engine.sglang import adapters

_encode = msgspec.msgpack.Encoder().encode


class EngineLoadSnapshot(LoadSnapshot, omit_defaults=True):
    """SGLang's snapshot in shared memory with more fields, which SGLang's own readers skip."""

    num_cached_tokens: int = 0
    kvmesh_store: StoreTraffic | None = None


def describe_engine(info: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """After `Scheduler.get_init_info`: what the Engine contract asks of a started engine."""
    model = scheduler.model_config
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    _, _, block_lengths = get_kv_transfer_buf_infos(pool)
    eos = model.hf_eos_token_id
    context = min(model.context_len, scheduler.max_total_num_tokens - _reserve(scheduler))
    embeds = not scheduler.is_generation
    if embeds:
        # There is no answer that would need the rest of the context.
        context = min(context, scheduler.max_req_input_len)
    info["kvmesh"] = {
        "context_length": context,
        "vocab_size": model.vocab_size,
        "page_size": scheduler.page_size,
        "total_blocks": scheduler.max_total_num_tokens // scheduler.page_size,
        "block_bytes": int(sum(block_lengths)),
        "eos_token_ids": sorted(eos) if isinstance(eos, set | list | tuple) else [eos] if eos else [],
        "max_prompt": context if embeds else min(scheduler.max_req_input_len, context) - 1,
        "embedding_size": model.hidden_size if embeds else 0,
        "adapters": {adapter.lora_name: adapter.lora_id for adapter in adapters.loaded()},
        "constraints": not embeds and scheduler.grammar_manager.grammar_backend is not None,
        "priorities": bool(scheduler.enable_priority_scheduling),
        "device": _device(scheduler),
        "pass_tokens": max(scheduler.chunked_prefill_size or scheduler.max_prefill_tokens, 0),
    }
    return info


def _device(scheduler: Any) -> str:
    """What it computes on, as its maker calls it."""
    if scheduler.device == "cuda":
        return torch.cuda.get_device_name()
    return str(scheduler.device)


def _reserve(scheduler: Any) -> int:
    """Tokens of the pool that SGLang keeps free of a request, however alone it is.

    A longer request would not be refused: it would wait for ever, and all others behind it.
    """
    reserve = 2 * scheduler.page_size
    if scheduler.disaggregation_mode == DisaggregationMode.DECODE:
        reserve += scheduler.disagg_decode_prealloc_queue.num_reserved_decode_tokens
    return reserve


def extend_load(snapshot: LoadSnapshot, inquirer: Any) -> EngineLoadSnapshot:
    """After the load is gathered: add what is cached and unreferenced, in tokens, and what went between this
    scheduler and the node's store.
    """
    fields = {name: getattr(snapshot, name) for name in snapshot.__struct_fields__}
    cached = inquirer.pool_stats_observer.get_pool_stats().full_evictable_size
    wrapper = getattr(inquirer.pool_stats_observer.tree_cache, "linker", None)
    traffic = getattr(wrapper.cache_linker, "stats", None) if wrapper is not None else None
    return EngineLoadSnapshot(**fields, num_cached_tokens=int(cached or 0), kvmesh_store=traffic)


def pack_time_stats(original: Callable[[Any], Any], value: Any) -> Any:
    """Around the packing of opaque output fields: times become five numbers a request, not a pickle.

    A row is (queue ms, prefill ms, transfer ms, transfer bytes, load ms); it is None in the steps that have
    nothing new to say, which is all but a request's first and last.
    """
    if not (isinstance(value, list) and value and isinstance(value[0], SchedulerReqTimeStats)):
        return original(value)
    return PickleWrapper(_encode([_times(stats) for stats in value]))


def _times(stats: SchedulerReqTimeStats) -> tuple[float, float, float, int, float] | None:
    finished = bool(stats.completion_time)
    if stats.__dict__.get("kvmesh_reported") and not finished:
        return None
    stats.__dict__["kvmesh_reported"] = True
    entered = (
        stats.prefill_bootstrap_queue_entry_time
        or stats.decode_prealloc_queue_entry_time
        or stats.wait_queue_entry_time
    )
    started = stats.forward_entry_time
    queue = started - entered if started and entered else 0.0
    if stats.decode_prealloc_queue_entry_time:
        # A decode engine waits for room; the rest of the way to its first step is the other half's.
        queue = max(0.0, stats.decode_transfer_queue_entry_time - entered)
        return (1e3 * queue, 0.0, 0.0, 0, 0.0)
    # The first output leaves before SGLang notes the end of its prefill.
    computed = (stats.prefill_finished_time or time.perf_counter()) - started if started else 0.0
    moved, ended = stats.__dict__.get("kvmesh_transfer", (0, 0.0))
    transfer = max(0.0, ended - stats.prefill_finished_time) if moved else 0.0
    load = stats.__dict__.get("kvmesh_load")
    return (1e3 * queue, 1e3 * computed, 1e3 * transfer, moved, load.ms if load else 0.0)
