"""How a model that embeds makes one vector of its tokens': as it was trained to, where its files say so.

SGLang chooses by architecture; checkpoints of sentence-transformers say in `1_Pooling/config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang.srt.layers.pooler import PoolingType
from sglang.srt.runtime_context import get_model

_KINDS = {
    "pooling_mode_mean_tokens": PoolingType.MEAN,
    "pooling_mode_cls_token": PoolingType.CLS,
    "pooling_mode_lasttoken": PoolingType.LAST,
}


def pool_as_trained(
    original: Callable[..., None], pooler: Any, pooling_type: PoolingType, normalize: bool
) -> None:
    """Around `Pooler.__init__`."""
    original(pooler, pooling_type=_trained(Path(get_model().model_path)) or pooling_type, normalize=normalize)


def _trained(directory: Path) -> PoolingType | None:
    file = directory / "1_Pooling" / "config.json"
    if not file.is_file():
        return None
    said = json.loads(file.read_text())
    return next((kind for name, kind in _KINDS.items() if said.get(name)), None)
