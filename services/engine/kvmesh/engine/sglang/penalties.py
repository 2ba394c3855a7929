"""`min_new_tokens` in a scheduler without a tokenizer, which SGLang's own code dies of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _NoStopTokens:
    """Adds nothing to the stop tokens that the model and the request name."""

    additional_stop_token_ids = None
    eos_token_id = None


def prepare_minimum(original: Callable[..., None], penalizer: Any) -> None:
    """Around the preparation of the penalty that holds stop tokens back."""
    bare = [req for req in penalizer.orchestrator.reqs() if req.tokenizer is None]
    for req in bare:
        req.tokenizer = _NoStopTokens
    try:
        original(penalizer)
    finally:
        for req in bare:
            req.tokenizer = None
