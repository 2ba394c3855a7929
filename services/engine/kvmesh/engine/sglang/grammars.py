"""Constrained decoding in a scheduler without a tokenizer, whose grammar backend SGLang leaves out.

The backend needs the vocabulary's bytes and nothing else of the tokenizer, so it is made here, from a
tokenizer that is forgotten afterwards.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.constrained.base_grammar_backend import create_grammar_backend
from sglang.srt.runtime_context import get_exec
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

log = logging.getLogger(__name__)


def add_backend(_result: None, manager: Any, scheduler: Any) -> None:
    """After `GrammarManager.__init__`. A model whose tokenizer cannot be used serves without constraints."""
    if manager.grammar_backend is not None or get_exec().kernel.grammar_backend == "none":
        return
    model, args = scheduler.model_config, scheduler.server_args
    try:
        tokenizer = get_tokenizer(
            args.tokenizer_path or args.model_path,
            tokenizer_mode=args.tokenizer_mode,
            trust_remote_code=args.trust_remote_code,
            tokenizer_revision=args.revision,
        )
        manager.grammar_backend = create_grammar_backend(
            args, tokenizer, model.vocab_size, model.hf_eos_token_id
        )
    # Tokenizers raise whatever their parsers do.
    except Exception as error:
        log.warning("no constrained decoding: %s: %s", type(error).__name__, error)
