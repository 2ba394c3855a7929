"""How object storage is reached: by configuration, with credentials of the environment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvmesh.common.config import ObjectTierConfig
from kvmesh.common.errors import invalid

if TYPE_CHECKING:
    from kvmesh.core import ObjectOptions


def options(settings: ObjectTierConfig, url: str = "") -> ObjectOptions:
    """Of the configured storage, or of another that is reached alike.

    Raises KvmeshError(INVALID_ARGUMENT) where the environment has half a key.
    """
    return {
        "url": url or settings.url,
        "bytes": settings.capacity,
        "endpoint": settings.endpoint or None,
        "region": settings.region or None,
        "credentials": _credentials(settings),
        "timeout_s": settings.timeout_s,
        "refresh_s": settings.refresh_s,
    }


def _credentials(settings: ObjectTierConfig) -> tuple[str, str, str | None] | None:
    names = settings.access_key_id_env, settings.secret_access_key_env
    key, secret = (os.environ.get(name, "") for name in names)
    if bool(key) != bool(secret):
        missing = names[1] if key else names[0]
        raise invalid(f"object storage needs a key and its id: the environment has no {missing}")
    return (key, secret, os.environ.get(settings.session_token_env) or None) if key else None
