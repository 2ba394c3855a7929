"""Prompts without a peer: the worker's own, before it takes requests.

SGLang takes a request that names `NO_PEER` for a rehearsal of its own: it hands no KV over, and caches
nothing of it, for fear that it is served to somebody. That suits what only measures time
(`kvmesh.engine.probing`). Blocks that are to be compared must be cached as any others are; their prompts are
random, and they are dropped before the engine serves (`kvmesh.engine.worker.parity`).
"""

from __future__ import annotations

from typing import Any

# `sglang.srt.disaggregation.utils.FAKE_BOOTSTRAP_HOST`.
NO_PEER = "2.2.2.2"
# The port that says so, there being nobody at any.
CACHED, NOT_CACHED = 0, 1


def cache_rehearsal(result: None, req: Any, *args: Any, **kwargs: Any) -> None:
    """After `Req.__init__`."""
    if (req.bootstrap_host, req.bootstrap_port) == (NO_PEER, CACHED):
        req.skip_radix_cache_insert = False
