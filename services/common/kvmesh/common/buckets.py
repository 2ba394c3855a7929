"""Small shared state in JetStream KV buckets: the one way they are made and read whole."""

from __future__ import annotations

import asyncio

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.api import KeyValueConfig, StorageType
from nats.js.errors import BadRequestError
from nats.js.kv import KeyValue

# What a call to a bucket may raise where the bus is away or will not have it.
BUS_FAILURES = (NatsError, OSError, TimeoutError)
# Seconds one request may take.
REQUEST_TIMEOUT_S = 1.0
# A whole bucket.
_READ_S = 10.0


async def open_bucket(client: Client, name: str, *, max_age_s: float = 0.0, on_disk: bool = True) -> KeyValue:
    """The bucket, on the server's disk or in memory, made if it is missing; values older than `max_age_s` are
    dropped (0: none). One that exists keeps its own settings. Raises BUS_FAILURES."""
    jetstream = client.jetstream(timeout=REQUEST_TIMEOUT_S)
    storage = StorageType.FILE if on_disk else StorageType.MEMORY
    wanted = KeyValueConfig(bucket=name, history=1, ttl=max_age_s or None, storage=storage)
    try:
        return await jetstream.create_key_value(wanted)
    except BadRequestError:
        return await jetstream.key_value(name)


async def read_all(bucket: KeyValue) -> dict[str, bytes]:
    """Every key's value now. Raises BUS_FAILURES."""
    values: dict[str, bytes] = {}
    watcher = await bucket.watchall()
    try:
        async with asyncio.timeout(_READ_S):
            async for entry in watcher:
                if entry is None:
                    # Said to end the state, but it also comes first, when the server had sent everything and
                    # none of it was here yet.
                    if not (await bucket.status()).values:
                        break
                    continue
                if entry.operation is None:
                    values[entry.key] = entry.value or b""
                # Entries after this one.
                if entry.delta == 0:
                    break
    finally:
        await watcher.stop()
    return values
