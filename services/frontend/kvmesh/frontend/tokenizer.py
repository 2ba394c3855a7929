"""A model's tokenizer and chat template, read from the files its workers name.

Only tokenizer files are needed, no weights; nothing here imports transformers for a model that has a
`tokenizer.json`.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import orjson

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.core import TextModel
from kvmesh.v1.errors_pb2 import ErrorCode

_T = TypeVar("_T")

# Bytes; shorter texts take well under a millisecond, less than a trip to another thread is worth.
_INLINE_BYTES = 8_192
# What a hub's repository has for text, old formats included.
_HUB_FILES = [
    "*.jinja",
    "added_tokens.json",
    "chat_template.json",
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*",
    "*.model",
    "vocab.*",
]

# The format whose templates refuse ids of calls that are not nine letters and digits.
_NINE_LETTERS = "mistral"
_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")

# Encoding releases the GIL; two threads keep the event loop's core free on small machines.
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenizer")
# Texts of seconds take turns, so that no other waits for them; each takes many times its size of memory.
_HUGE_BYTES = 1 << 20
_huge = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer-huge")


class TooLong(Exception):
    """A text has more tokens than were asked for, at least `tokens` of them; not all of it was tokenized."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens


class Tokenizer:
    """Text to token ids. What an answer's ids say is for `kvmesh.core.TextStream`, over `text`."""

    def __init__(self, text: TextModel) -> None:
        self.text = text

    @property
    def has_chat_template(self) -> bool:
        return self.text.has_chat_template

    async def encode(self, text: str, special: bool = True, limit: int | None = None) -> list[int]:
        """Token ids of a plain prompt, if `special` with the special tokens the model wants around it.

        Raises TooLong for one that is seen to have more than `limit` before all of it is tokenized; others
        that have more are returned.
        """
        return await _run(len(text), partial(self.text.encode, text, special, limit))

    async def decode(self, token_ids: list[int], skip_special: bool) -> str:
        """The text of token ids; bytes that are no UTF-8 are replaced."""
        return await _run(len(token_ids), partial(self.text.decode, token_ids, skip_special))

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        template_args: dict[str, Any],
        scope: str,
        limit: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins or goes on.

        `template_args`: `tools`, `add_generation_prompt`, `continue_final_message`, and what else the
        template is to see. What was met in the same `scope` before is not tokenized again; no other can tell.

        Raises KvmeshError(INVALID_ARGUMENT, param="messages") when the template refuses the conversation,
        UNSUPPORTED when the model has no template; TooLong as `encode` does.
        """
        if not self.has_chat_template:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_UNSUPPORTED,
                "the model has no chat template; use /v1/completions",
                param="model",
            )
        args = dict(template_args)
        tools = args.pop("tools", None)
        begin, go_on = args.pop("add_generation_prompt", True), args.pop("continue_final_message", False)
        if self.text.tool_format == _NINE_LETTERS:
            messages = _with_short_ids(messages)
        try:
            spoken, offered = orjson.dumps(messages), orjson.dumps(tools) if tools else None
            written = (spoken, offered, orjson.dumps(args))
            encode = partial(self.text.encode_chat, *written, begin, go_on, scope, limit)
            return await _run(len(spoken) + len(offered or b""), encode)
        # A TypeError is of values that are nested too deep to be written.
        except (TypeError, ValueError) as error:
            raise invalid(f"the model's chat template refuses the messages: {error}", "messages") from None


def _with_short_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ids that other models or constrained calls were given, as this template takes them."""
    shortened = []
    for message in messages:
        turn = dict(message)
        if "tool_call_id" in turn:
            turn["tool_call_id"] = _short_id(turn["tool_call_id"])
        if "tool_calls" in turn:
            turn["tool_calls"] = [{**call, "id": _short_id(call["id"])} for call in turn["tool_calls"]]
        shortened.append(turn)
    return shortened


def _short_id(id: str) -> str:
    return id if _SHORT_ID.fullmatch(id) else hashlib.sha256(id.encode()).hexdigest()[:9]


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
    directory = Path(path)
    if not directory.is_dir() and path.startswith(("/", ".")):
        raise _unusable(path, "no such directory on this machine; mount the model files here, too")
    try:
        if not directory.is_dir():
            from huggingface_hub import snapshot_download

            directory = Path(snapshot_download(path, allow_patterns=_HUB_FILES))
        if not Path(directory, "tokenizer.json").is_file():
            return _convert(directory)
        return Tokenizer(TextModel(directory))
    # transformers and the hub's client raise whatever their parsers and their HTTP client raise.
    except Exception as error:
        raise _unusable(path, str(error)) from error


def _convert(directory: Path) -> Tokenizer:
    """SentencePiece and other old formats; imports torch on the way."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise ValueError("it has no fast tokenizer; add a tokenizer.json")
    with TemporaryDirectory(prefix="kvmesh-tokenizer-") as converted:
        loaded.save_pretrained(converted)
        return Tokenizer(TextModel(converted))


def _unusable(path: str, why: str) -> KvmeshError:
    return KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, f"cannot load the tokenizer of {path}: {why}")


async def _run(size: int, function: Callable[[], _T]) -> _T:
    try:
        if size <= _INLINE_BYTES:
            return function()
        threads = _threads if size < _HUGE_BYTES else _huge
        return await asyncio.get_running_loop().run_in_executor(threads, function)
    except OverflowError as error:
        raise TooLong(error.args[0]) from None
