"""Who holds blocks, as others than the routers know it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError

from kvmesh.cli.bus import with_bucket
from kvmesh.common.buckets import read_all
from kvmesh.common.config import Config
from kvmesh.common.discovery.static import read_addresses
from kvmesh.common.grpc.client import Channels
from kvmesh.v1.common_pb2 import WorkerInfo
from kvmesh.v1.engine_pb2 import GetWorkerRequest
from kvmesh.v1.engine_pb2_grpc import WorkerServiceStub
from kvmesh.v1.kvbm_pb2 import GetStatsRequest
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceStub

# A listed worker or a store that has no answer for so long is not there.
_DEADLINE_S = 2.0


async def registered_holders(config: Config, channels: Channels) -> dict[str, str]:
    """host:port of every registered worker, and of the configured store while it answers, by id.

    Stores register nowhere: routers know other nodes' from what they publish. Raises KvmeshError: UNAVAILABLE
    where the registry is on a bus that does not answer, INVALID_ARGUMENT for a list that cannot be read.
    """
    if config.discovery.kind == "static":
        workers = await _listed(config, channels)
    else:
        workers = await _leased(config)
    return workers | await _store(config, channels)


async def _leased(config: Config) -> dict[str, str]:
    discovery = config.discovery
    leases = await with_bucket(config, discovery.bucket, read_all, max_age_s=discovery.ttl_s, on_disk=False)
    workers = {}
    for value in leases.values():
        try:
            info = WorkerInfo.FromString(value)
        except DecodeError:
            continue  # routers do not take it for a worker either
        workers[info.id] = info.address
    return workers


async def _listed(config: Config, channels: Channels) -> dict[str, str]:
    """Those that answer: being listed is no sign of life."""

    async def ask(address: str) -> str:
        try:
            stub = WorkerServiceStub(channels.get(address))
            return (await stub.GetWorker(GetWorkerRequest(), timeout=_DEADLINE_S)).worker.id
        except grpc.aio.AioRpcError:
            return ""

    addresses = read_addresses(Path(config.discovery.file))
    ids = await asyncio.gather(*map(ask, addresses))
    return {id_: address for id_, address in zip(ids, addresses, strict=True) if id_}


async def _store(config: Config, channels: Channels) -> dict[str, str]:
    if not config.kvbm.enabled:
        return {}
    address = f"{config.kvbm.advertised_host()}:{config.kvbm.port}"
    try:
        stub = KvbmServiceStub(channels.get(address))
        stats = await stub.GetStats(GetStatsRequest(), timeout=_DEADLINE_S)
    except grpc.aio.AioRpcError:
        return {}
    return {stats.id: address}
