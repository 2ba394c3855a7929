"""Writes a GGUF file as a Hugging Face checkpoint: bfloat16 safetensors, tokenizer, chat template.

Covers what the default model needs: the llama architecture with tied embeddings and a byte-level
BPE tokenizer. The names of GGUF's keys and tensors are those of its specification,
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from kvmesh.common.errors import KvmeshError
from kvmesh.v1.errors_pb2 import ErrorCode

# GGUF's token types that never come out of running text.
_CONTROL, _USER_DEFINED = 3, 4

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_checkpoint(source: Path, directory: Path, progress: Callable[[str, float], None]) -> None:
    """Fill the empty `directory` from `source`. Raises KvmeshError(UNSUPPORTED) for other architectures.

    The tokenizer is checked against the GGUF's vocabulary, the weights against the architecture.
    """
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise _unsupported(source, f"architecture {fields['general.architecture']}")
    weights = _weights(reader, fields, progress)
    config = _model_config(fields, tied="lm_head.weight" not in weights)
    _check_weights(source, weights, config)
    progress("writing the checkpoint", 1.0)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    tokenizer, tokenizer_config = _tokenizer(source, fields)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    _write_json(
        directory / "special_tokens_map.json",
        {key: tokenizer_config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")},
    )


def _weights(
    reader: GGUFReader, fields: dict[str, Any], progress: Callable[[str, float], None]
) -> dict[str, np.ndarray]:
    heads = fields["llama.attention.head_count"]
    kv_heads = fields["llama.attention.head_count_kv"]
    weights: dict[str, np.ndarray] = {}
    for done, tensor in enumerate(reader.tensors):
        progress("dequantizing weights", done / len(reader.tensors))
        # GGUF lists dimensions fastest first.
        values = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        if ".attn_q." in tensor.name:
            values = _uninterleave(values, heads)
        elif ".attn_k." in tensor.name:
            values = _uninterleave(values, kv_heads)
        weights[_name(tensor.name)] = np.ascontiguousarray(values.astype(ml_dtypes.bfloat16))
    return weights


def _name(name: str) -> str:
    if name in _TENSORS:
        return _TENSORS[name]
    _blk, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.{suffix}"


def _uninterleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from GGUF's rope order (pairs side by side) to halves side by side."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _model_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    hidden = fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "dtype": "bfloat16",
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        # A float32 on the file; its shortest decimal form is the number that was meant.
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_scaling": None,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "vocab_size": fields["llama.vocab_size"],
    }


def _check_weights(source: Path, weights: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    expected = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        expected["lm_head.weight"] = (vocab, hidden)
    shapes = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        expected |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in shapes.items()}
    found = {name: values.shape for name, values in weights.items()}
    if wrong := sorted(name for name, _ in found.items() ^ expected.items()):
        raise _unsupported(source, f"tensors {', '.join(wrong[:3])}")


def _tokenizer(source: Path, fields: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and what transformers wants to know of it."""
    kind, split = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    # `smollm` means: every digit on its own, then GPT-2's words.
    if (kind, split) != ("gpt2", "smollm"):
        raise _unsupported(source, f"tokenizer {kind}/{split}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=fields["tokenizer.ggml.add_space_prefix"]),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _USER_DEFINED
        ]
    )
    if [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())] != tokens:
        raise _unsupported(source, "a vocabulary that does not survive the conversion")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": fields["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": fields["tokenizer.ggml.add_space_prefix"],
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "additional_special_tokens": special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
    return tokenizer, config


def _unsupported(source: Path, what: str) -> KvmeshError:
    return KvmeshError(ErrorCode.ERROR_CODE_UNSUPPORTED, f"cannot convert {source.name}: unknown {what}")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
