"""The mesh's bus, for commands that look once and go."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import nats
from nats.js.kv import KeyValue

from kvmesh.common.buckets import BUS_FAILURES, open_bucket
from kvmesh.common.bus import bus_security
from kvmesh.common.config import Config
from kvmesh.common.errors import KvmeshError
from kvmesh.common.tls import MeshTls
from kvmesh.v1.errors_pb2 import ErrorCode

_CONNECT_S = 3

_T = TypeVar("_T")


async def with_bucket(
    config: Config,
    name: str,
    work: Callable[[KeyValue], Awaitable[_T]],
    *,
    max_age_s: float = 0.0,
    on_disk: bool = True,
) -> _T:
    """What `work` makes of a bucket, which `open_bucket` makes if it is missing.

    Raises KvmeshError(UNAVAILABLE) where the bus cannot be reached.
    """
    url = config.nats.effective_url()

    async def ignore(_: Exception) -> None:
        """The same failure is raised, too."""

    try:
        client = await nats.connect(
            url,
            name="kvmesh",
            connect_timeout=_CONNECT_S,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            error_cb=ignore,
            **bus_security(MeshTls.of(config.bus_tls())),
        )
        try:
            return await work(await open_bucket(client, name, max_age_s=max_age_s, on_disk=on_disk))
        finally:
            await client.close()
    except BUS_FAILURES as error:
        raise KvmeshError(
            ErrorCode.ERROR_CODE_UNAVAILABLE,
            f"the bus at {url} does not answer: {str(error) or type(error).__name__}; is the mesh running? "
            "(`kvmesh status`; `nats.url` names a bus elsewhere)",
        ) from None
