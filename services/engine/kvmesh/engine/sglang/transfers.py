"""NIXL on host memory, and what a request's KV hand-over took.

SGLang registers KV memory with NIXL as device memory, which fails on a CPU, and reports neither bytes
nor time of NIXL transfers.
"""

from __future__ import annotations

import time
from typing import Any

from nixl import _api as nixl_api
from sglang.srt.runtime_context import get_device

# The longest wait of NIXL's progress thread between two looks, in microseconds.
_PROGRESS_US = 5_000
# Rooms concluded and not yet reported; bounded, since an aborted room is never reported.
_MOST_CONCLUDED = 4096


def prepare_nixl(_manager: Any, args: Any, *_rest: Any, **_options: Any) -> None:
    """Before the NIXL manager starts: KV lies in host memory where there is no device."""
    if get_device().device == "cpu":
        args.kv_data_mem_kinds = ["DRAM"] * len(args.kv_data_ptrs)
    _rest_progress_thread()


def _rest_progress_thread() -> None:
    """Let NIXL's progress thread sleep until something happens.

    NIXL's Python binding sets the longest wait of that thread to 0, so that it takes a whole core
    for nothing; it is woken by events in any case.
    """
    binding: Any = nixl_api.nixlBind  # pyright: ignore[reportAttributeAccessIssue]
    make_agent = binding.nixlAgent

    def rested(name: str, config: Any) -> Any:
        config.pthrDelay = max(config.pthrDelay, _PROGRESS_US)
        return make_agent(name, config)

    binding.nixlAgent = rested


def note_conclusion(manager: Any, *_args: Any, bootstrap_room: int, **_options: Any) -> None:
    """Before a transfer is declared done: its end, seen by the thread that waited for it."""
    concluded = manager.__dict__.setdefault("kvmesh_concluded", {})
    if len(concluded) >= _MOST_CONCLUDED:
        concluded.pop(next(iter(concluded)), None)
    concluded[bootstrap_room] = time.perf_counter()


def complete_metric(metric: Any, sender: Any) -> Any:
    """After SGLang has counted a transfer's bytes: add when it ended."""
    concluded = sender.kv_mgr.__dict__.get("kvmesh_concluded", {})
    metric.kvmesh_ended = concluded.pop(sender.bootstrap_room, time.perf_counter())
    return metric


def keep_metric(stats: Any, transfer_metric: Any) -> None:
    """Before SGLang's own metrics: keep the figures with the request, for its last output."""
    stats.kvmesh_transfer = (
        transfer_metric.transfer_total_bytes or 0,
        getattr(transfer_metric, "kvmesh_ended", 0.0),
    )
