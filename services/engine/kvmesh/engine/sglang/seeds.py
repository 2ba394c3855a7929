"""Seeded sampling for the requests that ask for it.

SGLang honours seeds only in its deterministic mode, which slows every request down and needs kernels
a CPU does not have. Here the rows of a batch that have a seed are sampled once more, by a number that
follows from the seed and the position alone; the other rows are left to SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# In SGLang's column of seeds: a request without one.
_NONE = -1
_U64 = (1 << 64) - 1


def add_seeds(info: Any, _cls: type, batch: Any, *_rest: Any, **_options: Any) -> None:
    """After a batch's sampling is gathered; SGLang then carries the column through merges and filters."""
    seeds = [req.sampling_params.sampling_seed for req in batch.reqs]
    if info.sampling_seed is None and any(seed is not None for seed in seeds):
        column = [_NONE if seed is None else seed for seed in seeds]
        info.sampling_seed = torch.tensor(column, dtype=torch.int64, device=info.temperatures.device)


def match_seeds(info: Any, other: Any) -> None:
    """Before two batches are merged: SGLang merges columns that both have."""
    if (info.sampling_seed is None) != (other.sampling_seed is None):
        bare = info if info.sampling_seed is None else other
        rows = len(bare.temperatures)
        bare.sampling_seed = torch.full((rows,), _NONE, dtype=torch.int64, device=bare.temperatures.device)


def sample_seeded(
    original: Callable[..., Any], sampler: Any, probs: torch.Tensor, info: Any, positions: Any, simple: bool
) -> Any:
    """Around sampling from probabilities. With SGLang's deterministic mode on, seeds are its own affair."""
    if info.sampling_seed is None or sampler.enable_deterministic:
        return original(sampler, probs, info, positions, simple)
    column, info.sampling_seed = info.sampling_seed, None
    try:
        chosen, capture = original(sampler, probs, info, positions, simple)
    finally:
        info.sampling_seed = column
    seeds = column.tolist()
    rows = [row for row, seed in enumerate(seeds) if seed != _NONE]
    if rows:
        places = positions.tolist()
        uniform = [_uniform(seeds[row], places[row]) for row in rows]
        chosen[rows] = _sample(probs[rows], info, rows, uniform).to(chosen.dtype)
    return chosen, capture


def _sample(probs: torch.Tensor, info: Any, rows: list[int], uniform: list[float]) -> torch.Tensor:
    """Rows cut by top_k, top_p and min_p as SGLang cuts them, then read off where `uniform` falls."""
    likely, tokens = probs.double().sort(dim=-1, descending=True, stable=True)
    before = likely.cumsum(dim=-1) - likely
    ranks = torch.arange(likely.shape[-1], device=probs.device)
    cut = (ranks >= info.top_ks[rows].view(-1, 1)) | (before > info.top_ps[rows].view(-1, 1))
    cut |= likely < likely[:, :1] * info.min_ps[rows].view(-1, 1)
    total = likely.masked_fill(cut, 0.0).cumsum(dim=-1)
    target = torch.tensor(uniform, dtype=total.dtype, device=total.device).view(-1, 1) * total[:, -1:]
    last = (~cut).sum(dim=-1, keepdim=True) - 1
    place = torch.minimum(torch.searchsorted(total, target, right=True), last)
    return tokens.gather(1, place).view(-1)


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) of the two (splitmix64)."""
    mixed = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _U64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _U64
    return ((mixed ^ (mixed >> 31)) >> 11) / (1 << 53)
