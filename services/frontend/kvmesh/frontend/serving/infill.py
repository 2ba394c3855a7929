"""Prompts of answers that go between two texts, marked as models that were trained for it have them."""

from __future__ import annotations

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.models import Model
from kvmesh.v1.errors_pb2 import ErrorCode

# Before the first text, between the two, and behind them, where the answer begins: as coders of Qwen, of
# StarCoder and Granite, and of DeepSeek were trained.
_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001 - as the model has them
)


def infill_prompt(model: Model, before: str, behind: str) -> str:
    """A prompt whose answer goes between the two texts. Raises KvmeshError(UNSUPPORTED) for other models."""
    known = model.tokenizer.text.token_id
    for first, between, last in _MARKS:
        if None not in (known(first), known(between), known(last)):
            return f"{first}{before}{between}{behind}{last}"
    raise KvmeshError(
        ErrorCode.ERROR_CODE_UNSUPPORTED,
        f"the model {model.info.name!r} was not trained to write between two texts; remove suffix",
        param="suffix",
    )
