"""EventService of a router: what its index has of a holder, for those who compare."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from kvmesh.router.index import IndexFeed
from kvmesh.v1.events_pb2 import SnapshotRequest, SnapshotResponse
from kvmesh.v1.events_pb2_grpc import EventServiceServicer


class IndexServicer(EventServiceServicer):
    """Snapshots only: a router publishes nothing that could be replayed."""

    def __init__(self, feed: IndexFeed) -> None:
        self._feed = feed

    async def Snapshot(self, request: SnapshotRequest, context: Any) -> AsyncIterator[SnapshotResponse]:
        for batch in self._feed.snapshot(request.holder_id):
            yield SnapshotResponse(batch=batch)
