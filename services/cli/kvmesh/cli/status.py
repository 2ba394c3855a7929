"""What a running mesh says of itself, as one JSON document: each part asked in its own process.

A part that does not answer within the deadline is shown with its `error`; the others are unaffected.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import nats
import nats.errors

from kvmesh.cli.home import Home, MeshStatus, ProcessState, ProcessStatus
from kvmesh.cli.routers import router_addresses
from kvmesh.common.bus import bus_security
from kvmesh.common.config import Config
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.client import Channels
from kvmesh.common.tls import MeshTls
from kvmesh.v1 import common_pb2, engine_pb2, kvbm_pb2, router_pb2
from kvmesh.v1.engine_pb2_grpc import WorkerServiceStub
from kvmesh.v1.kvbm_pb2_grpc import KvbmServiceStub
from kvmesh.v1.router_pb2_grpc import RouterServiceStub

DEADLINE_S = 2.0
_WORKER_ROLES = ("prefill", "decode", "aggregated")


async def collect(home: Home) -> dict[str, Any] | None:
    """Ask every part at once; None when no mesh runs in `home`. Takes three times `DEADLINE_S` at most."""
    status = home.read_status()
    owner = home.owner()
    if status is None or owner is None or status.supervisor != owner:
        return None
    config = home.read_config()
    channels = Channels(MeshTls.of(config.tls))
    try:
        own = [process.address for process in status.processes if process.role == "router"]
        # Its own are shown whether they have registered or not.
        addresses = dict.fromkeys([*own, *await router_addresses(config)])
        routers, kvbm, bus = await asyncio.gather(
            asyncio.gather(*(_router(address, channels) for address in addresses)),
            _kvbm(config, channels),
            _nats(config),
        )
        # One may be known by two addresses, its own here and the one that others reach it by.
        routers = list({router.get("replica") or router["address"]: router for router in routers}.values())
        known = [router.pop("workers", []) for router in routers]
        workers = await _workers(status, next(filter(None, known), []), channels)
    finally:
        await channels.close()
    return {
        "mesh": status.model_dump(mode="json", exclude={"processes", "supervisor"})
        | {"home": str(home.root), "pid": owner.pid},
        "workers": workers,
        # The first that answers; all know the same.
        "router": next((router for router in routers if "error" not in router), routers[0]),
        "routers": routers,
        "kvbm": kvbm,
        "nats": bus,
        "processes": _processes(status),
    }


async def _router(address: str, channels: Channels) -> dict[str, Any]:
    stub = RouterServiceStub(channels.get(address))
    try:
        state = await stub.GetState(router_pb2.GetStateRequest(), timeout=DEADLINE_S)
    except grpc.aio.AioRpcError as error:
        return {"address": address, "error": KvmeshError.from_rpc(error, "router").message}
    return {
        "address": address,
        "policy": state.policy,
        "leases": state.leases,
        "leases_expired_total": state.leases_expired_total,
        "bus_connected": state.bus_connected,
        "index": _fields(state.index),
        "replica": state.replica_id,
        "replicas": [_fields(replica) for replica in state.replicas],
        "workers": list(state.workers),
    }


async def _kvbm(config: Config, channels: Channels) -> list[dict[str, Any]]:
    if not config.kvbm.enabled:
        return []
    address = f"{config.kvbm.advertised_host()}:{config.kvbm.port}"
    store: dict[str, Any] = {"id": config.kvbm.id, "address": address, "tiers": []}
    stub = KvbmServiceStub(channels.get(address))
    try:
        stats = await stub.GetStats(kvbm_pb2.GetStatsRequest(), timeout=DEADLINE_S)
    except grpc.aio.AioRpcError as error:
        return [store | {"error": KvmeshError.from_rpc(error, "kvbm").message}]
    tiers = [
        _fields(tier) | {"tier": _enum(common_pb2.Tier, tier.tier, "TIER_"), "evicted": dict(tier.evicted)}
        for tier in stats.tiers
    ]
    nvme = _fields(stats.nvme) if stats.HasField("nvme") else None
    objects = _fields(stats.objects) | {
        "skipped": dict(stats.objects.skipped),
        "missed": dict(stats.objects.missed),
    }
    network = _fields(stats.network) | {
        "failed": dict(stats.network.failed),
        "bytes_per_s": dict(stats.network.bytes_per_s),
    }
    lower = {"nvme": nvme, "network": network, "objects": objects if stats.HasField("objects") else None}
    return [store | _fields(stats) | {"tiers": tiers} | lower]


async def _nats(config: Config) -> dict[str, Any]:
    url, security = config.nats.effective_url(), bus_security(MeshTls.of(config.bus_tls()))
    bus: dict[str, Any] = {"url": url, "connected": False}
    failures: list[str] = []

    async def note(error: Exception) -> None:
        failures.append(str(error) or type(error).__name__)

    client = None
    try:
        async with asyncio.timeout(DEADLINE_S):
            client = await nats.connect(
                url, allow_reconnect=False, connect_timeout=1, error_cb=note, **security
            )
            started = time.monotonic()
            await client.flush()
            rtt_ms = (time.monotonic() - started) * 1000
            server = client.connected_server_version
            account = await client.jetstream().account_info()
    except (OSError, TimeoutError, nats.errors.Error) as error:
        return bus | {"error": failures[-1] if failures else str(error) or type(error).__name__}
    finally:
        if client is not None:
            await client.close()
    return bus | {
        "connected": True,
        "version": f"{server.major}.{server.minor}.{server.patch}",
        "rtt_ms": round(rtt_ms, 2),
        "jetstream": {
            "streams": account.streams,
            "storage_bytes": account.storage,
        },
    }


async def _workers(
    status: MeshStatus, routed: list[router_pb2.RoutedWorker], channels: Channels
) -> list[dict[str, Any]]:
    """The router's workers and this machine's own, each asked for itself."""
    by_id = {worker.info.id: worker for worker in routed}
    by_address = {worker.info.address: worker for worker in routed}
    own = {process.address: process for process in status.processes if process.role in _WORKER_ROLES}

    async def ask(address: str) -> dict[str, Any]:
        stub = WorkerServiceStub(channels.get(address))
        try:
            answer = await stub.GetWorker(engine_pb2.GetWorkerRequest(), timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            reason = KvmeshError.from_rpc(error, "worker").message
            worker = _silent_worker(address, by_address.get(address), own.get(address)) | {"error": reason}
        else:
            worker = _worker(answer.worker)
        known = by_id.get(worker.get("id", ""))
        worker["routed"] = known is not None
        if known is not None:
            worker |= {"leases": known.leases, "indexed_blocks": known.indexed_blocks}
        return worker

    answers = await asyncio.gather(*(ask(address) for address in dict.fromkeys([*own, *by_address])))
    # Own ones come first, and again, by another address, when they listen on all.
    unique: dict[str, dict[str, Any]] = {}
    for worker in answers:
        unique.setdefault(worker.get("id", worker["address"]), worker)
    return list(unique.values())


def _silent_worker(
    address: str, routed: router_pb2.RoutedWorker | None, process: ProcessStatus | None
) -> dict[str, Any]:
    """What others know of a worker that does not answer."""
    worker = _worker(routed.info) if routed else {"address": address}
    if process is not None:
        worker = {"id": process.name, "role": process.role} | worker
    starting = process is not None and process.state is ProcessState.STARTING
    return worker | {"state": "starting" if starting else "unreachable"}


def _worker(info: common_pb2.WorkerInfo) -> dict[str, Any]:
    return {
        "id": info.id,
        "role": _enum(common_pb2.Role, info.role, "ROLE_"),
        "engine": info.engine,
        "state": _enum(common_pb2.WorkerState, info.state, "WORKER_STATE_"),
        "address": info.address,
        "node": info.node,
        "pid": info.pid,
        "model": info.model.name,
        "blocks_total": info.kv.total_blocks,
        "page_size": info.kv.page_size,
        "block_bytes": info.kv.block_bytes,
        "context_length": info.model.context_length,
        **_fields(info.load),
    }


def _processes(status: MeshStatus) -> list[dict[str, Any]]:
    return [
        process.model_dump(mode="json", exclude={"process", "log_start"})
        | {"pid": process.process.pid if process.process else None}
        for process in status.processes
    ]


def _fields(message: Any) -> dict[str, Any]:
    """Every field by name, zeros included; 64-bit numbers stay numbers, unlike in protobuf's own JSON."""
    return {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}


def _enum(kind: Any, value: int, prefix: str) -> str:
    return kind.Name(value).removeprefix(prefix).lower()
