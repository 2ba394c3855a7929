"""Keeps a dying scheduler's last words where its launcher finds them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmesh.engine.sglang.environment import FAULT_FILE


def record_fault(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around a scheduler's construction and its event loop. SGLang logs what they raise, and no more."""
    try:
        return original(*args, **kwargs)
    except Exception as error:
        if path := os.environ.get(FAULT_FILE):
            Path(path).write_text(f"{type(error).__name__}: {error}")
        raise
