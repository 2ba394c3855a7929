"""What the mock engine takes a prompt for: the sum of its tokens' directions, so that prompts with the same
tokens are near each other, whatever their order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def embed(token_ids: Sequence[int], size: int) -> list[float]:
    """A vector of `size` numbers and length 1; equal prompts have equal ones."""
    total = np.sum([_direction(token, size) for token in token_ids], axis=0)
    return (total / np.linalg.norm(total)).tolist()


@lru_cache(maxsize=4096)
def _direction(token: int, size: int) -> NDArray[np.float64]:
    return np.random.default_rng(token).standard_normal(size)
