"""LoRA adapters inside SGLang: which are loaded, and how their blocks are named."""

from __future__ import annotations

from typing import Any

from sglang.srt.runtime_context import get_lora


def loaded() -> list[Any]:
    """Those that this engine loads when it starts: SGLang's LoRARefs, by `lora_name` and `lora_id`."""
    settings = get_lora()
    return list(settings.lora_paths or ()) if settings.enable_lora else []


def name_by_salt(_result: None, request: Any, *_args: Any, **_kwargs: Any) -> None:
    """After `Req.__init__`. SGLang tells an adapter's blocks apart by `extra_key`, of which its KV events
    and its storage keys make different names; the salt, which comes with every adapter, does so already."""
    if request.lora_id is not None and request.extra_key == request.lora_id and request.cache_salt:
        request.extra_key = None
