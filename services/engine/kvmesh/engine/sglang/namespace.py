"""What an engine's KV blocks depend on besides their tokens: the namespace they are stored under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch.distributed

from kvmesh.engine.sglang import adapters
from kvmesh.engine.sglang.device_pages import DevicePages, UnsupportedPool

_SAMPLE_BYTES = 4096
# Of files whose tensors cannot be told apart.
_SAMPLES_PER_FILE = 1024
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


class StoreNamespace(NamedTuple):
    """The part of a store's namespace beside the segments' sizes."""

    model: str
    revision: str
    dtype: str
    layout: str
    rank: int
    ranks: int


class Shard(NamedTuple):
    """Which of the model's parallel shards this process has."""

    rank: int
    ranks: int


def store_namespace(
    server_args: Any, params: Any, pages: DevicePages, given: dict[str, str]
) -> StoreNamespace:
    """The namespace of this scheduler's blocks.

    `given["model"]` and `given["revision"]` win over what the model's files say. Raises UnsupportedPool where
    neither tells. Reads some megabytes of weights.
    """
    model, revision = given.get("model"), given.get("revision")
    if not revision:
        directory = _directory(server_args.model_path, server_args.revision)
        revision = fingerprint(directory)
        model = model or directory.name
    # Whatever changes the numbers in the cache: equal blocks must come from equal computations.
    numerics = {
        "dtype": str(server_args.dtype),
        "kv": pages.dtype,
        "quantization": server_args.quantization,
        "overrides": server_args.json_model_override_args,
        # Blocks of an adapter are named by its name, under which other weights may come tomorrow.
        **_adapters(),
    }
    rank, ranks = shard_of(params)
    if pages.replicated:
        # Every tensor-parallel rank holds the same blocks: they share one copy.
        tensor_ranks = _group(params)[1]
        rank, ranks = rank // tensor_ranks, ranks // tensor_ranks
    return StoreNamespace(
        model=model or server_args.model_path,
        revision=revision,
        dtype=json.dumps(numerics, sort_keys=True),
        layout=pages.layout,
        rank=rank,
        ranks=ranks,
    )


def _adapters() -> dict[str, dict[str, str]]:
    weights = {one.lora_name: fingerprint(_directory(one.lora_path, None)) for one in adapters.loaded()}
    return {"adapters": weights} if weights else {}


def shard_of(params: Any) -> Shard:
    """This process among all that hold parts of the same tokens' KV."""
    tensor_rank, tensor_ranks = _group(params)
    context = params.pp_rank * params.attn_cp_size + params.attn_cp_rank
    return Shard(context * tensor_ranks + tensor_rank, params.pp_size * params.attn_cp_size * tensor_ranks)


def _group(params: Any) -> tuple[int, int]:
    group = params.attn_tp_cache_group or params.tp_cache_group
    if group is None or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def _directory(model: str, revision: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise UnsupportedPool(f"cannot tell which weights {model} has: {error}") from None


def fingerprint(directory: Path) -> str:
    """Identifies a model's weights by its configuration and samples of every tensor; equal on every node."""
    digest = hashlib.sha256()
    config = directory / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    files = sorted({file for pattern in _WEIGHTS for file in directory.glob(pattern)})
    if not files:
        raise UnsupportedPool(
            f"cannot tell which weights {directory} has: there are none of {', '.join(_WEIGHTS)}"
        )
    for path in files:
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        with path.open("rb") as file:
            for offset in _samples(path, file):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def _samples(path: Path, file: BinaryIO) -> Iterator[int]:
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        header = int.from_bytes(file.read(8), "little")
        for tensor in json.loads(file.read(header)).values():
            if "data_offsets" in tensor:
                start, end = tensor["data_offsets"]
                yield 8 + header + (start + end) // 2
    else:
        yield from range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES_PER_FILE))
