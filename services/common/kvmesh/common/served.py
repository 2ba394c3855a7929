"""The part of the configuration that says what is served: models, their engines, how many workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Section):
    id: str = "default"
    """`default` (SmolLM2-135M-Instruct, carried by a package), a directory, or a Hugging Face id"""
    name: str = ""
    """name clients send; empty: the id, or the directory's last part"""
    aliases: list[str] = ["default"]
    """further names of the model"""
    context_length: int | None = Field(default=None, ge=16)
    """prompt plus output tokens; empty: what the model says"""
    tool_format: str = "auto"
    """how it writes tool calls (docs/reference/text.md); `auto`: as its template says; `none`: as text"""
    reasoning_format: str = "auto"
    """how it marks reasoning; `auto` and `none` likewise"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """number format of weights and KV"""
    task: Literal["generate", "embed"] = "generate"
    """`embed`: it is asked for embeddings, and for nothing else"""


class MockConfig(Section):
    """The mock engine's timing model; times in milliseconds of model time, before `speedup`."""

    total_blocks: int = Field(default=4096, gt=0)
    page_size: int = Field(default=16, gt=0)
    vocab_size: int = Field(default=49152, gt=0)
    context_length: int = Field(default=8192, gt=0)
    block_bytes: int = Field(default=1 << 20, gt=0)
    max_batch: int = Field(default=64, gt=0)
    prefill_base_ms: float = Field(default=5.0, ge=0)
    prefill_token_ms: float = Field(default=0.02, ge=0)
    decode_base_ms: float = Field(default=6.0, ge=0)
    decode_sequence_ms: float = Field(default=0.1, ge=0)
    embedding_size: int = Field(default=64, gt=0)
    """numbers in a vector, of a model that embeds"""
    adapters: list[str] = []
    """names of LoRA adapters that it takes requests for"""
    transfer_gib_s: float = Field(default=10.0, gt=0)
    speedup: float = Field(default=1.0, gt=0)
    bootstrap_timeout_s: float = Field(default=10.0, gt=0)
    """real seconds the halves of a split request wait for each other"""


class EngineConfig(Section):
    kind: Literal["sglang", "mock"] = "sglang"
    page_size: int = Field(default=16, gt=0)
    """tokens in a block"""
    probe: bool = True
    """engines measure themselves as they start, two seconds at most, so that routers need not guess"""
    forkserver: bool = True
    """on CPUs, `kvmesh up` imports SGLang once and forks engines from there: they start much sooner"""
    forkserver_socket: str = ""
    """of a process that forks engines and runs already; empty: the mesh has its own"""
    args: dict[str, Any] = {}
    """SGLang server arguments, e.g. `tp_size: 2`, `max_total_tokens: 65536`; they win over kvmesh's own"""
    prefill_args: dict[str, Any] = {}
    """the same, for prefill workers only"""
    decode_args: dict[str, Any] = {}
    """the same, for decode workers only"""
    aggregated_args: dict[str, Any] = {}
    """the same, for aggregated workers only"""
    mock: MockConfig = MockConfig()


class WorkersConfig(Section):
    prefill: int = Field(default=1, ge=0)
    """prefill workers `kvmesh up` starts"""
    decode: int = Field(default=1, ge=0)
    """decode workers"""
    aggregated: int = Field(default=0, ge=0)
    """aggregated workers"""
    drain_s: float = Field(default=30.0, ge=0)
    """longest wait for live requests at shutdown"""


class ModelEngineConfig(Section):
    """How one model's engines differ from `engine`; what is empty is as there."""

    kind: Literal["sglang", "mock"] | None = None
    page_size: int | None = Field(default=None, gt=0)
    args: dict[str, Any] = {}
    """joins `engine.args`, and wins over it; so do the next three"""
    prefill_args: dict[str, Any] = {}
    decode_args: dict[str, Any] = {}
    aggregated_args: dict[str, Any] = {}
    mock: MockConfig | None = None
    """in place of `engine.mock`"""


class ModelWorkersConfig(Section):
    """One model's workers; roles that are not named have none."""

    prefill: int = Field(default=0, ge=0)
    decode: int = Field(default=0, ge=0)
    aggregated: int = Field(default=0, ge=0)


class ServedModelConfig(ModelConfig):
    """One of several models."""

    aliases: list[str] = []
    """further names of the model"""
    default: bool = False
    """what requests without a model mean; where none says so, the first that generates"""
    engine: ModelEngineConfig = ModelEngineConfig()
    workers: ModelWorkersConfig | None = None
    """empty: as in `workers`; of a model that embeds: one aggregated worker"""

    @property
    def key(self) -> str:
        """What tells it from the others in the configuration."""
        return self.name or self.id


def check_names(models: Sequence[ServedModelConfig]) -> None:
    """Raise ValueError unless every name means one model, and at most one of them is the default."""
    if len(_told_default(models)) > 1:
        raise ValueError("only one of `models` can be the `default`")
    taken: set[str] = set()
    for model in models:
        names = {model.key, *model.aliases}
        if twice := taken & names:
            raise ValueError(f"two of `models` are called {min(twice)}: give one another `name`")
        taken |= names


def default_of(models: Sequence[ServedModelConfig]) -> ServedModelConfig:
    """The one that requests without a model mean."""
    return next(
        iter(_told_default(models) or [model for model in models if model.task == "generate"] or models)
    )


def _told_default(models: Sequence[ServedModelConfig]) -> list[ServedModelConfig]:
    return [model for model in models if model.default or "default" in model.aliases]


def parts(
    model: ServedModelConfig, default: bool, engine: EngineConfig, workers: WorkersConfig
) -> dict[str, Section]:
    """The sections `model`, `engine` and `workers` of one of several models' workers."""
    named = {name: getattr(model, name) for name in ModelConfig.model_fields}
    if default and "default" not in model.aliases:
        named["aliases"] = [*model.aliases, "default"]
    own = {
        name: {**getattr(engine, name), **value} if isinstance(value, dict) else value
        for name in ModelEngineConfig.model_fields
        if (value := getattr(model.engine, name)) is not None
    }
    counts = model.workers
    if counts is None and model.task == "embed":
        counts = ModelWorkersConfig(aggregated=1)
    return {
        "model": ModelConfig(**named),
        "engine": engine.model_copy(update=own),
        "workers": workers.model_copy(update=counts.model_dump() if counts else {}),
    }
