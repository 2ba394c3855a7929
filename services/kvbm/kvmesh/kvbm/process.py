"""The kvbm process from start to drain."""

from __future__ import annotations

import asyncio
import contextlib
import time

import structlog

from kvmesh.common.bus import Bus
from kvmesh.common.config import Config, KvbmConfig
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.common.events.source import PublicationServicer
from kvmesh.common.grpc.client import Channels
from kvmesh.common.lifecycle import RoleServer
from kvmesh.common.tls import MeshTls
from kvmesh.core import StoreServer
from kvmesh.kvbm import objects
from kvmesh.kvbm.bringing import Bringing
from kvmesh.kvbm.exposition import Exposition
from kvmesh.kvbm.fetching import Fetching
from kvmesh.kvbm.lending import Lending
from kvmesh.kvbm.link import Link
from kvmesh.kvbm.neighbours import Neighbours
from kvmesh.kvbm.publisher import StorePublisher
from kvmesh.kvbm.service import KvbmServicer
from kvmesh.kvbm.warming import Warmer
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.events_pb2_grpc import add_EventServiceServicer_to_server
from kvmesh.v1.kvbm_pb2_grpc import add_KvbmServiceServicer_to_server

log = structlog.get_logger()

# Calls are short; engines notice the end by their connection's.
DRAIN_S = 5.0
# What is only in memory is written to the disk and to object storage for so long at the end.
KEEP_S = 10.0


async def serve(config: Config) -> None:
    """Own the node's tiers until the process is asked to stop.

    Raises KvmeshError when the tier cannot be had, or kvbm is disabled.
    """
    settings = config.kvbm
    socket = config.kvbm_socket()
    if socket is None:
        raise invalid("kvbm is disabled; set kvbm.enabled to true, or do not start it")
    began = time.monotonic()
    async with contextlib.AsyncExitStack() as cleanup:
        store = await asyncio.to_thread(_open, socket, settings)
        cleanup.push_async_callback(asyncio.to_thread, store.stop)
        log.info(
            "host tier ready",
            bytes=settings.host_bytes,
            huge_bytes=await asyncio.to_thread(lambda: store.huge_bytes),
            dir=settings.shm_dir,
            socket=socket,
            eviction=settings.eviction,
            seconds=round(time.monotonic() - began, 2),
        )
        _tell_of_lower(store, settings)
        bus = Bus.of(config, settings.id)
        # A port that the kernel chooses is nobody's to know; then the store is found by configuration alone.
        address = f"{settings.advertised_host()}:{settings.port}" if settings.port else ""
        publisher = StorePublisher(store, bus, settings.id, time.time_ns(), config.node, address)
        link, channels = Link(store), Channels(MeshTls.of(config.tls))
        lending, fetching = Lending(store, link), Fetching(store, link, channels)
        neighbours = Neighbours(bus, channels, settings.id)
        bringing = Bringing(store, fetching, neighbours)
        exposition = Exposition(store, lending, fetching)
        server = RoleServer("kvbm", config, settings)
        warmer = Warmer(store, settings.object, fetching, channels)
        servicer = KvbmServicer(store, settings.id, config.node, settings.eviction, lending, fetching, warmer)
        server.add_service("kvmesh.v1.KvbmService", add_KvbmServiceServicer_to_server, servicer)
        events = PublicationServicer(publisher.publication)
        server.add_service("kvmesh.v1.EventService", add_EventServiceServicer_to_server, events)

        cleanup.push_async_callback(link.close)
        cleanup.callback(lending.close)
        cleanup.push_async_callback(channels.close)
        cleanup.push_async_callback(fetching.close)
        cleanup.push_async_callback(bringing.close)
        cleanup.push_async_callback(neighbours.close)
        cleanup.push_async_callback(bus.close)
        await bus.start()
        await neighbours.start()
        bringing.start()
        cleanup.push_async_callback(server.stop, DRAIN_S)
        await server.start()
        cleanup.push_async_callback(publisher.close)
        publisher.start()
        cleanup.push_async_callback(exposition.close)
        exposition.start()
        server.set_ready(True)
        await server.wait_for_stop()
        server.set_ready(False)
        await asyncio.to_thread(_keep, store)


def _open(socket: str, settings: KvbmConfig) -> StoreServer:
    nvme = settings.nvme
    try:
        return StoreServer(
            socket,
            settings.host_bytes,
            settings.shm_dir,
            settings.eviction,
            tenant_weights=settings.tenant_weights or None,
            nvme_path=nvme.path or None,
            nvme_bytes=nvme.capacity,
            nvme_bytes_per_day=nvme.bytes_per_day or None,
            objects=objects.options(settings.object) if settings.object.url else None,
            pin_bytes=settings.pin_bytes_per_tenant or None,
            scrub_bytes_per_s=settings.scrub_bytes_per_s or None,
        )
    except OSError as error:
        raise KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, str(error)) from None
    except ValueError as error:
        raise invalid(str(error)) from None


def _tell_of_lower(store: StoreServer, settings: KvbmConfig) -> None:
    flow = store.flow()
    if flow is not None and flow["problem"] is None:
        nvme = settings.nvme
        log.info(
            "nvme tier ready", bytes=nvme.capacity, dir=nvme.path, io=flow["io"], blocks=flow["recovered"]
        )
    kept = store.objects()
    if kept is not None and kept["problem"] is None:
        log.info("object storage ready", url=kept["url"], blocks=kept["recovered"])


def _keep(store: StoreServer) -> None:
    """Write to the tiers that stay what would be lost with the process."""
    states = [state for state in (store.flow(), store.objects()) if state is not None]
    if not states or any(state["problem"] for state in states):
        return
    try:
        store.persist(KEEP_S)
    except (OSError, ValueError) as error:
        log.warning("not all blocks were kept", error=str(error))
