"""Lets a decode engine hear that its offloads to KVBM are done."""

from __future__ import annotations

from typing import Any


def take_completed(scheduler: Any) -> None:
    """Before `process_decode_queue`, once a step: unlock the blocks whose offload has ended.

    SGLang's prefill and aggregated loops do this for every kind of tier; its decode loop does it for
    HiCache only. Without it every offloaded block stays locked and the device pool fills up.
    """
    if scheduler.enable_unified_cache_external_linker:
        scheduler.tree_cache.check_hicache_events()
