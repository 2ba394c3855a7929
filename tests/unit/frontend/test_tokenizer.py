"""Tokenizers of the checkpoints there are, with and without a tokenizer.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fixtures.frontend import model_path
from fixtures.text import TEMPLATES, checkpoint
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.tokenizer import Tokenizer, TooLong, load_tokenizer
from kvmesh.v1.errors_pb2 import ErrorCode

TEXT = "Grüße, 🗼 and  spaces\n"
USER: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]


def test_nothing_heavy_is_imported_for_a_tokenizer_json() -> None:
    script = (
        "import asyncio, sys\n"
        "from kvmesh.frontend.__main__ import main\n"
        "from kvmesh.frontend.tokenizer import load_tokenizer\n"
        f"tokenizer = asyncio.run(load_tokenizer({model_path()!r}))\n"
        "assert asyncio.run(tokenizer.encode('hello'))\n"
        "heavy = {'transformers', 'tokenizers', 'torch', 'jinja2', 'huggingface_hub'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


@pytest.fixture
def old_format(tmp_path: Path) -> Path:
    """GPT-2's two files."""
    written = json.loads(Path(model_path(), "tokenizer.json").read_text())
    vocabulary, merges = written["model"]["vocab"], written["model"]["merges"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "chat_template": TEMPLATES["qwen"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return tmp_path


async def test_an_old_format_is_converted(old_format: Path) -> None:
    before = os.listdir(old_format)
    tokenizer = await load_tokenizer(str(old_format))
    ids = await tokenizer.encode(TEXT)
    assert tokenizer.text.decode(ids) == TEXT
    rendered = await tokenizer.encode_chat(USER, {}, "")
    assert tokenizer.text.decode(rendered, skip_special=False).endswith(
        "hello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (tokenizer.text.tool_format, tokenizer.text.reasoning_format) == ("hermes", "think")
    # The checkpoint is as it was.
    assert os.listdir(old_format) == before


async def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    for path in (tmp_path / "absent", empty, broken):
        with pytest.raises(KvmeshError, match="cannot load the tokenizer of") as caught:
            await load_tokenizer(str(path))
        assert caught.value.code == ErrorCode.ERROR_CODE_UNAVAILABLE


async def test_a_file_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, TEMPLATES["qwen"])
    first = await load_tokenizer(str(path))
    assert await load_tokenizer(str(path)) is first
    file = path / "tokenizer.json"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    assert await load_tokenizer(str(path)) is not first


async def test_long_texts_are_encoded_alike() -> None:
    tokenizer = await load_tokenizer(model_path())
    long = TEXT * 2_000
    assert await tokenizer.encode(long) == tokenizer.text.encode(long)
    messages = [{"role": "user", "content": long}]
    assert tokenizer.text.decode(await tokenizer.encode_chat(messages, {}, "")).count("🗼") == 2_000


def _deep() -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(500):
        value = {"x": value}
    return value


@pytest.mark.parametrize("args", [{"tools": [_deep()]}, {"x": _deep()}])
async def test_values_that_are_too_deep(tmp_path: Path, args: dict[str, Any]) -> None:
    tokenizer: Tokenizer = await load_tokenizer(str(checkpoint(tmp_path, TEMPLATES["qwen"])))
    with pytest.raises(KvmeshError) as caught:
        await tokenizer.encode_chat(USER, args, "")
    assert (caught.value.code, caught.value.param) == (ErrorCode.ERROR_CODE_INVALID_ARGUMENT, "messages")


async def test_a_conversation_without_a_template(tmp_path: Path) -> None:
    tokenizer = await load_tokenizer(str(checkpoint(tmp_path, None)))
    with pytest.raises(KvmeshError, match="no chat template") as caught:
        await tokenizer.encode_chat(USER, {}, "")
    assert (caught.value.code, caught.value.param) == (ErrorCode.ERROR_CODE_UNSUPPORTED, "model")


async def test_what_is_far_too_long_is_refused_before_it_is_tokenized() -> None:
    tokenizer = await load_tokenizer(model_path())
    text = "The quick brown fox jumps. " * 1_000
    count = len(await tokenizer.encode(text))
    # As long as is allowed, and more by little: then all of it is looked at.
    for limit in (count, count - 1):
        assert len(await tokenizer.encode(text, limit=limit)) == count
    for too_long in (
        tokenizer.encode(text * 20, limit=count),
        tokenizer.encode_chat([{"role": "user", "content": text * 20}], {}, "", count),
        # Each of them is short.
        tokenizer.encode_chat([{"role": "user", "content": "a"}] * 1_000, {}, "", 1_000),
    ):
        with pytest.raises(TooLong) as caught:
            await too_long
        assert caught.value.tokens > 1_000
        assert caught.value.tokens <= 20 * count
