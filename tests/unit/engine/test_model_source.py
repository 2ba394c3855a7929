"""Finding a model, and writing the carried GGUF as a checkpoint; on a tiny GGUF made here."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers

from kvmesh.common.config import Config, load_config
from kvmesh.common.errors import KvmeshError
from kvmesh.engine import model
from kvmesh.engine.gguf import write_checkpoint
from kvmesh.engine.model import ModelSource, resolve_model
from kvmesh.v1.errors_pb2 import ErrorCode

LAYERS, HIDDEN, HEADS, KV_HEADS, INNER = 2, 64, 4, 2, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["he", "Ġhe"]
VOCABULARY = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + WORDS
MERGES = ["h e", "Ġ he"]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def make_gguf(path: Path, *, architecture: str = "llama", skip: str = "") -> dict[str, np.ndarray]:
    """A random model; returns its tensors as transformers would name and lay them out."""
    generator = np.random.default_rng(7)
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCABULARY) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
    expected: dict[str, np.ndarray] = {}

    def add(name: str, theirs: str, *shape: int, heads: int = 0) -> None:
        values = generator.standard_normal(shape, dtype=np.float32)
        expected[theirs] = values
        if name == skip:
            return
        if heads:
            # As llama.cpp's converter does: row 2i of a head is row i, row 2i + 1 is row i + half.
            half = shape[0] // heads // 2
            order = [
                h * 2 * half + i + part * half for h in range(heads) for i in range(half) for part in (0, 1)
            ]
            values = values[order]
        writer.add_tensor(name, values)

    add("token_embd.weight", "model.embed_tokens.weight", len(VOCABULARY), HIDDEN)
    add("output_norm.weight", "model.norm.weight", HIDDEN)
    kv = HIDDEN // HEADS * KV_HEADS
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        add(f"blk.{i}.attn_norm.weight", f"{layer}.input_layernorm.weight", HIDDEN)
        add(f"blk.{i}.attn_q.weight", f"{layer}.self_attn.q_proj.weight", HIDDEN, HIDDEN, heads=HEADS)
        add(f"blk.{i}.attn_k.weight", f"{layer}.self_attn.k_proj.weight", kv, HIDDEN, heads=KV_HEADS)
        add(f"blk.{i}.attn_v.weight", f"{layer}.self_attn.v_proj.weight", kv, HIDDEN)
        add(f"blk.{i}.attn_output.weight", f"{layer}.self_attn.o_proj.weight", HIDDEN, HIDDEN)
        add(f"blk.{i}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", HIDDEN)
        add(f"blk.{i}.ffn_gate.weight", f"{layer}.mlp.gate_proj.weight", INNER, HIDDEN)
        add(f"blk.{i}.ffn_up.weight", f"{layer}.mlp.up_proj.weight", INNER, HIDDEN)
        add(f"blk.{i}.ffn_down.weight", f"{layer}.mlp.down_proj.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tiny.gguf"
    make_gguf(path)
    monkeypatch.setattr(model, "_packaged_gguf", lambda: path)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(None, {"cache_dir": str(tmp_path / "cache")})


def test_weights_come_out_as_transformers_names_and_lays_them_out(tmp_path: Path) -> None:
    expected = make_gguf(tmp_path / "tiny.gguf")
    parts: list[float] = []
    write_checkpoint(tmp_path / "tiny.gguf", tmp_path, lambda _what, part: parts.append(part))
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        assert weights[name].dtype.name == "bfloat16"
        np.testing.assert_allclose(weights[name].astype(np.float32), values, rtol=2**-8)
    assert parts == sorted(parts)
    assert parts[-1] == 1.0
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["rms_norm_eps"] == 1e-5
    assert settings["tie_word_embeddings"] is True
    assert (settings["head_dim"], settings["num_key_value_heads"]) == (16, 2)


def test_the_tokenizer_is_the_files(tmp_path: Path) -> None:
    make_gguf(tmp_path / "tiny.gguf")
    write_checkpoint(tmp_path / "tiny.gguf", tmp_path, lambda _what, _part: None)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("he he").tokens == ["he", "Ġhe"]
    # Every digit is a token of its own, and its space another.
    assert tokenizer.encode(" 42").tokens == ["Ġ", "4", "2"]
    assert tokenizer.encode("<|im_start|>he<|im_end|>").ids == [1, VOCABULARY.index("he"), 2]
    for text in ["Ünïcödé 漢字 🎉", "  two  spaces\n\ttab", "it's 3.14"]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert settings["chat_template"] == TEMPLATE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "gemma3"}, "unknown architecture gemma3"),
        ({"skip": "blk.1.ffn_up.weight"}, r"unknown tensors model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, change: dict[str, str], said: str) -> None:
    make_gguf(tmp_path / "tiny.gguf", **change)
    with pytest.raises(KvmeshError, match=said):
        write_checkpoint(tmp_path / "tiny.gguf", tmp_path, lambda _what, _part: None)


def test_the_default_model_is_prepared_once_by_many_at_once(
    gguf: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = model._write

    def counted(directory: Path, progress: model.Progress) -> None:
        written.append(directory)
        write(directory, progress)

    monkeypatch.setattr(model, "_write", counted)
    with ThreadPoolExecutor(4) as pool:
        sources = list(pool.map(resolve_model, [config] * 8))
    assert len(set(sources)) == 1
    assert len(written) == 1
    assert sources[0].name == "SmolLM2-135M-Instruct"
    directory = Path(sources[0].path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in directory.iterdir()}
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in directory.iterdir())


def test_a_damaged_checkpoint_and_leftovers_are_replaced(gguf: Path, config: Config) -> None:
    directory = Path(resolve_model(config).path)
    weights = directory / "model.safetensors"
    size = weights.stat().st_size
    os.truncate(weights, size // 2)
    leftover = directory.parent / f".{directory.name}.abc"
    leftover.mkdir()
    assert resolve_model(config).path == str(directory)
    assert weights.stat().st_size == size
    assert not leftover.exists()


def test_a_failure_leaves_nothing_behind(gguf: Path, config: Config) -> None:
    make_gguf(gguf, architecture="gemma3")
    with pytest.raises(KvmeshError):
        resolve_model(config)
    assert [path.suffix for path in (config.cache_dir / "models").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_says_what_to_set(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KvmeshError, match="set `cache_dir` to a writable directory"):
        resolve_model(load_config(None, {"cache_dir": str(tmp_path / "file")}))


def test_a_directory_is_used_as_it_is(gguf: Path, config: Config, tmp_path: Path) -> None:
    path = resolve_model(config).path
    chosen = load_config(None, {"model": {"id": path}})
    assert resolve_model(chosen) == ModelSource(Path(path).name, path)
    named = load_config(None, {"model": {"id": path, "name": "mine"}})
    assert resolve_model(named).name == "mine"
    with pytest.raises(KvmeshError, match=r"has no config\.json"):
        resolve_model(load_config(None, {"model": {"id": str(tmp_path)}}))


@pytest.mark.parametrize("model_id", ["/no/such/place", "./nor/this", "~/nor-that", "a/b/c", "two words"])
def test_what_is_neither_directory_nor_hub_id_is_refused(model_id: str) -> None:
    with pytest.raises(KvmeshError, match=r"set `model\.id`") as caught:
        resolve_model(load_config(None, {"model": {"id": model_id}}))
    assert caught.value.code == ErrorCode.ERROR_CODE_MODEL_NOT_FOUND


def test_a_hub_model_that_cannot_be_had_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(KvmeshError, match="not in the local cache and Hugging Face cannot be reached"):
        resolve_model(load_config(None, {"model": {"id": "nobody/nothing"}}))
