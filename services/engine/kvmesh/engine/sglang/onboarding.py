"""What requests do while their blocks come to the node, and where these are said to have come from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang.srt.managers.schedule_policy import AddReqResult

# Tokens whose time makes up the pace; older ones count little.
MEMORY_TOKENS = 16_384


@dataclass(slots=True)
class LoadTime:
    """How long a request's load took, from its begin until its last layer was there.

    Set by the loader's thread, before the request's first output.
    """

    ms: float = 0.0


class Onboarding:
    """One linker's; all of it is on the scheduler's thread."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._tokens = self._seconds = 0.0
        # The request of the last look-up, if more of its blocks are being brought to the node.
        self.coming: str | None = None
        # Tokens of the last load by the tier they came up from: nvme, network.
        self.origins: tuple[int, int] = (0, 0)
        self.load_time = LoadTime()

    @property
    def per_block_s(self) -> float:
        """In how long this engine computes a block; 0 while nothing is known."""
        return self._page_size * self._seconds / self._tokens if self._tokens else 0.0

    def computed(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens took so long."""
        kept = max(0.0, 1.0 - tokens / MEMORY_TOKENS)
        self._tokens = kept * self._tokens + tokens
        self._seconds = kept * self._seconds + seconds


def look_ahead(_result: Any, scheduler: Any, req: Any, *_rest: Any) -> None:
    """After `Scheduler._prefetch_kvcache`, as a request comes in: blocks begin to come while it queues.

    One that need not wait is looked up at once in any case.
    """
    busy = scheduler.waiting_queue or scheduler.chunked_req or not scheduler.running_batch.is_empty()
    if _of(scheduler.tree_cache) is not None and (busy or scheduler.disaggregation_mode.value == "prefill"):
        req.init_next_round_input(scheduler.tree_cache, cow_mamba=False)


def pass_over(original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `PrefillAdder.add_one_req`, which follows the request's look-up.

    It stays in the queue while more of its blocks are being brought. The store says when that is over.
    """
    onboarding = _of(adder.tree_cache)
    if onboarding is not None and onboarding.coming == req.rid:
        # Said of this pass alone: a prompt that the device has by the next one is not looked up.
        onboarding.coming = None
        return AddReqResult.CONTINUE
    return original(adder, req, *args, **kwargs)


def note_origins(_result: Any, wrapper: Any, req: Any) -> None:
    """After `UnifiedCacheLinkerWrapper.load_back`."""
    onboarding = getattr(wrapper.cache_linker, "onboarding", None)
    if onboarding is not None and req.rid in wrapper.private_load_indices:
        req.kvmesh_origins = onboarding.origins
        req.time_stats.__dict__["kvmesh_load"] = onboarding.load_time


def note_pace(_result: Any, scheduler: Any, batch: Any, *_rest: Any) -> None:
    """After `Scheduler.process_batch_result`: how long a pass took that had nothing to wait for."""
    onboarding = _of(scheduler.tree_cache)
    if onboarding is None or not batch.forward_mode.is_extend() or batch.launch_ts is None:
        return
    if not any(hasattr(req, "kvmesh_origins") for req in batch.reqs):
        onboarding.computed(sum(batch.extend_lens or ()), time.monotonic() - batch.launch_ts)


def name_tiers(details: dict[str, Any] | None, _streamer: Any, req: Any) -> dict[str, Any] | None:
    """After `get_cached_tokens_details`: SGLang counts as host what its linker loaded."""
    nvme, network = getattr(req, "kvmesh_origins", (0, 0))
    if details is None or not nvme + network:
        return None
    network = min(network, details["host"])
    nvme = min(nvme, details["host"] - network)
    return details | {"host": details["host"] - nvme - network, "nvme": nvme, "network": network}


def _of(tree_cache: Any) -> Onboarding | None:
    wrapper = getattr(tree_cache, "linker", None)
    return getattr(wrapper.cache_linker, "onboarding", None) if wrapper is not None else None
