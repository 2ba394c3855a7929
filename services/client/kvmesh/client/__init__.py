"""A client of kvmesh's frontend over gRPC: `Client`, and `AsyncClient` for asyncio.

What is streamed are the stubs' own messages (`kvmesh.v1.frontend_pb2`); failures are `RequestError`.
"""

from kvmesh.client.aio import AsyncClient
from kvmesh.client.connection import Tls
from kvmesh.client.errors import RequestError
from kvmesh.client.sync import Client

__all__ = ["AsyncClient", "Client", "RequestError", "Tls"]
