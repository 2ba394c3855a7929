"""EventService: served from a Publication, and read by those who follow one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc

from kvmesh.common.errors import KvmeshError
from kvmesh.common.events.publication import Publication
from kvmesh.common.grpc.client import Channels
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.events_pb2 import (
    KvEventBatch,
    ReplayRequest,
    ReplayResponse,
    SnapshotRequest,
    SnapshotResponse,
)
from kvmesh.v1.events_pb2_grpc import EventServiceServicer, EventServiceStub

# Seconds a snapshot or a replay may take.
TIMEOUT_S = 30.0


class PublicationServicer(EventServiceServicer):
    """Snapshots and replays of the one holder behind this server."""

    def __init__(self, publication: Publication) -> None:
        self._publication = publication

    async def Snapshot(self, request: SnapshotRequest, context: Any) -> AsyncIterator[SnapshotResponse]:
        self._check(request.holder_id)
        for batch in self._publication.snapshot():
            yield SnapshotResponse(batch=batch)

    async def Replay(self, request: ReplayRequest, context: Any) -> AsyncIterator[ReplayResponse]:
        self._check(request.holder_id)
        for batch in self._publication.replay(request.incarnation, request.from_sequence):
            yield ReplayResponse(batch=batch)

    def _check(self, holder_id: str) -> None:
        own = self._publication.holder_id
        if holder_id not in ("", own):
            raise KvmeshError(
                ErrorCode.ERROR_CODE_NOT_FOUND, f"this is {own}, not {holder_id}; look its address up again"
            )


class EventSource:
    """Reads one server's EventService. Methods raise KvmeshError."""

    def __init__(self, channels: Channels, address: str) -> None:
        self._address = address
        self._stub = EventServiceStub(channels.get(address))

    async def snapshot(self, holder_id: str) -> list[KvEventBatch]:
        """The holder's whole state; the last batch has its sequence and digests.

        A snapshot that is cut off, or is not of one life, is DATA_CORRUPTED.
        """
        call = self._stub.Snapshot(SnapshotRequest(holder_id=holder_id), timeout=TIMEOUT_S)
        try:
            batches = [response.batch async for response in call]
        except grpc.RpcError as error:
            raise KvmeshError.from_rpc(error, self._address) from None
        if not batches or len({(batch.incarnation, batch.sequence) for batch in batches}) > 1:
            raise KvmeshError(ErrorCode.ERROR_CODE_DATA_CORRUPTED, f"{holder_id}: not one whole snapshot")
        return batches

    async def replay(
        self, holder_id: str, incarnation: int, first: int
    ) -> AsyncGenerator[KvEventBatch, None]:
        """The batches from number `first` on, as they come; close it to end it early.

        Raises KvmeshError(NOT_FOUND) when they are not kept any more.
        """
        request = ReplayRequest(holder_id=holder_id, incarnation=incarnation, from_sequence=first)
        call = self._stub.Replay(request, timeout=TIMEOUT_S)
        try:
            async for response in call:
                yield response.batch
        except grpc.RpcError as error:
            raise KvmeshError.from_rpc(error, self._address) from None
        finally:
            call.cancel()
