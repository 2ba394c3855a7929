"""A model's tokenizer and chat template, read from the files its workers name.

Only tokenizer files are needed, no weights; nothing here imports torch for a model that has a
`tokenizer.json`.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer as FastTokenizer

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.frontend.token_bytes import TokenBytes
from kvmesh.v1.errors_pb2 import ErrorCode

# Characters; shorter texts take well under a millisecond, less than a trip to another thread is worth.
_INLINE_CHARS = 8_192

# `encode` releases the GIL; two threads keep the event loop's core free on small machines.
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenizer")


class Tokenizer:
    """Text to token ids. Decoding is `kvmesh.frontend.detokenizer`'s, over `fast`."""

    def __init__(self, hf_tokenizer: Any) -> None:
        """`hf_tokenizer`: a transformers tokenizer with a fast backend."""
        self._hf = hf_tokenizer
        self.fast: FastTokenizer = hf_tokenizer.backend_tokenizer

    @cached_property
    def vocabulary(self) -> TokenBytes:
        """The bytes of each token."""
        return TokenBytes(self.fast)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    async def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a plain prompt, if `special` with the special tokens the model wants around it."""
        return await _run(len(text), self._encode, text, special)

    async def decode(self, token_ids: list[int], skip_special: bool) -> str:
        """The text of token ids; bytes that are no UTF-8 are replaced."""
        return await _run(len(token_ids), self._decode, token_ids, skip_special)

    async def encode_chat(self, messages: list[dict[str, Any]], template_args: dict[str, Any]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins or goes on.

        `template_args`: what else `apply_chat_template` takes, and the template.

        Raises KvmeshError(INVALID_ARGUMENT, param="messages") when the template refuses the conversation,
        UNSUPPORTED when the model has no template.
        """
        if not self.has_chat_template:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_UNSUPPORTED,
                "the model has no chat template; use /v1/completions",
                param="model",
            )
        size = sum(len(message["content"]) for message in messages)
        return await _run(size, self._encode_chat, messages, template_args)

    def _decode(self, token_ids: list[int], skip_special: bool) -> str:
        return self.fast.decode(token_ids, skip_special_tokens=skip_special)

    def _encode(self, text: str, special: bool) -> list[int]:
        return self.fast.encode(text, add_special_tokens=special).ids

    def _encode_chat(self, messages: list[dict[str, Any]], template_args: dict[str, Any]) -> list[int]:
        try:
            text = self._hf.apply_chat_template(
                messages, tokenize=False, **{"add_generation_prompt": True, **template_args}
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise invalid(f"the model's chat template refuses the messages: {error}", "messages") from None
        # The template has written the special tokens.
        return self._encode(text, False)


async def load_tokenizer(path: str) -> Tokenizer:
    """Read the tokenizer of a checkpoint directory or Hugging Face id; takes up to seconds, in a thread.

    Raises KvmeshError(UNAVAILABLE) with the reason when it cannot be had.
    """
    return await asyncio.get_running_loop().run_in_executor(_threads, _load, path)


def _load(path: str) -> Tokenizer:
    file = Path(path, "tokenizer.json")
    # Workers come back sooner than a tokenizer is read; a file that was replaced is read again.
    return _read(path, file.stat().st_mtime_ns if file.is_file() else 0)


@lru_cache(maxsize=8)
def _read(path: str, version: int) -> Tokenizer:
    local = Path(path).is_dir()
    if not local and path.startswith(("/", ".")):
        raise _unusable(path, "no such directory on this machine; mount the model files here, too")
    try:
        if local and not version:
            # Converts SentencePiece and other old formats; imports torch on the way.
            from transformers import AutoTokenizer

            loaded = AutoTokenizer.from_pretrained(path, local_files_only=True)
        else:
            from transformers import PreTrainedTokenizerFast

            loaded = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=local)
    # transformers raises whatever its parsers and its HTTP client raise.
    except Exception as error:
        raise _unusable(path, str(error)) from error
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise _unusable(path, "it has no fast tokenizer; add a tokenizer.json")
    return Tokenizer(loaded)


def _unusable(path: str, why: str) -> KvmeshError:
    return KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, f"cannot load the tokenizer of {path}: {why}")


async def _run(size: int, function: Any, *args: Any) -> Any:
    if size <= _INLINE_CHARS:
        return function(*args)
    return await asyncio.get_running_loop().run_in_executor(_threads, function, *args)
