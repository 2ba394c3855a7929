"""DecodeService over the worker's streams."""

from __future__ import annotations

from kvmesh.common.grpc.streams import Stream
from kvmesh.common.lifecycle import RoleServer
from kvmesh.engine.worker import Connection, Streams
from kvmesh.v1.engine_pb2 import GenerateRequest, GenerateResponse


def add_service(server: RoleServer, streams: Streams) -> None:
    def accept(stream: Stream) -> Connection:
        return streams.accept(stream, GenerateRequest, GenerateResponse, "generate")

    server.add_stream("kvmesh.v1.DecodeService", "Generate", accept)
