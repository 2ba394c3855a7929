"""Rehearsed prompts are cached like any other, so that what is said of them can be compared.

SGLang keeps a request without a peer out of its cache, for fear that its own warm-up is served to somebody.
kvmesh's rehearsals are random, and their blocks are dropped before the engine serves
(`kvmesh.engine.worker.parity`).
"""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST


def cache_rehearsal(result: None, req: Any, *args: Any, **kwargs: Any) -> None:
    """After `Req.__init__`."""
    if req.bootstrap_host == FAKE_BOOTSTRAP_HOST:
        req.skip_radix_cache_insert = False
