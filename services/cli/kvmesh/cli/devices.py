"""Which GPUs each engine of this machine gets, and how much of one when engines have to share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmesh.common.served import EngineConfig

# Of a shared GPU's memory; the rest is for what engines need beside weights and KV: activations, graphs.
_SHARED_PART = 0.8


@dataclass(frozen=True)
class Devices:
    """One engine's part."""

    # In the words of CUDA_VISIBLE_DEVICES.
    ids: tuple[str, ...]
    # Of the memory that is free when it starts; None leaves it to the engine, which then takes most of it.
    memory_fraction: float | None = None
    # The engine on the same GPU that must have taken its part before.
    after: str = ""


def visible(environment: Mapping[str, str]) -> list[str]:
    """The GPUs there are, or those of them the caller's CUDA_VISIBLE_DEVICES names."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [part.strip() for part in environment["CUDA_VISIBLE_DEVICES"].split(",") if part.strip()]
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def gpus_of(engine: EngineConfig, role: str) -> int:
    """GPUs one engine of `role` spreads over."""
    arguments = _arguments(engine, role)
    size = 1
    for names in (("tp_size", "tensor_parallel_size", "tp"), ("pp_size", "pipeline_parallel_size", "pp")):
        size *= int(next((arguments[name] for name in names if name in arguments), 1))
    return size


def divide(engines: Mapping[str, EngineConfig], gpus: Sequence[str]) -> dict[str, Devices]:
    """Parts for the workers (`role-index`) that have these engines, in order, over the GPUs in turn.

    Engines measure free memory when they start, so those that share a GPU start one after the other,
    each taking its part of what the ones before it have left. A configured `mem_fraction_static` stands.
    """
    if not gpus:
        return {}
    places: dict[str, tuple[str, ...]] = {}
    position = 0
    for name, engine in engines.items():
        size = min(gpus_of(engine, name.rpartition("-")[0]), len(gpus))
        places[name] = tuple(gpus[(position + i) % len(gpus)] for i in range(size))
        position += size
    parts: dict[str, Devices] = {}
    seen: dict[str, list[str]] = {gpu: [] for gpu in gpus}
    for name, ids in places.items():
        sharers = max(sum(gpu in other for other in places.values()) for gpu in ids)
        before = max((seen[gpu] for gpu in ids), key=len)
        fraction = None
        if sharers > 1 and "mem_fraction_static" not in _arguments(engines[name], name.rpartition("-")[0]):
            part = _SHARED_PART / sharers
            fraction = round(part / (1 - part * len(before)), 3)
        parts[name] = Devices(ids, fraction, before[-1] if before else "")
        for gpu in ids:
            seen[gpu].append(name)
    return parts


def _arguments(engine: EngineConfig, role: str) -> dict[str, Any]:
    by_role = {
        "prefill": engine.prefill_args,
        "decode": engine.decode_args,
        "aggregated": engine.aggregated_args,
    }
    return {name.replace("-", "_"): value for name, value in (engine.args | by_role[role]).items()}
