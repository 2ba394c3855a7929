"""The gate in front of FrontendService: keys and limits as over REST, in metadata."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from kvmesh.frontend.models import Models
from kvmesh.frontend.tenants.contract import CALLER, Caller
from kvmesh.frontend.tenants.gate import admitted, limit_headers
from kvmesh.frontend.tenants.tenants import Tenants
from kvmesh.v1.frontend_pb2 import (
    ChatRequest,
    ChatResponse,
    CompleteRequest,
    CompleteResponse,
    EmbedRequest,
    EmbedResponse,
    FrontendServiceGenerateRequest,
    FrontendServiceGenerateResponse,
    ListModelsRequest,
    ListModelsResponse,
)
from kvmesh.v1.frontend_pb2_grpc import FrontendServiceServicer


class GatedService(FrontendServiceServicer):
    """Around the service: every method asks who calls, those that generate whether one more may in."""

    def __init__(self, service: Any, tenants: Tenants, models: Models) -> None:
        self._service = service
        self._tenants = tenants
        self._models = models

    async def Chat(self, request: ChatRequest, context: Any) -> AsyncIterator[ChatResponse]:
        async with self._admitted(context), aclosing(self._service.Chat(request, context)) as responses:
            async for response in responses:
                yield response

    async def Complete(self, request: CompleteRequest, context: Any) -> AsyncIterator[CompleteResponse]:
        async with self._admitted(context), aclosing(self._service.Complete(request, context)) as responses:
            async for response in responses:
                yield response

    async def Generate(
        self, request: FrontendServiceGenerateRequest, context: Any
    ) -> AsyncIterator[FrontendServiceGenerateResponse]:
        async with self._admitted(context), aclosing(self._service.Generate(request, context)) as responses:
            async for response in responses:
                yield response

    async def Embed(self, request: EmbedRequest, context: Any) -> EmbedResponse:
        async with self._admitted(context):
            return await self._service.Embed(request, context)

    async def ListModels(self, request: ListModelsRequest, context: Any) -> ListModelsResponse:
        key = self._caller(context).key
        usable = self._models.usable()
        names = self._models.names_of
        return ListModelsResponse(models=[m.info for m in usable if key is None or key.allows(names(m))])

    def _caller(self, context: Any) -> Caller:
        """Who calls; stays set for the rest of the RPC, which has its task for itself."""
        metadata = context.invocation_metadata() or ()
        caller = self._tenants.caller({k: v for k, v in metadata if isinstance(v, str)})
        CALLER.set(caller)
        return caller

    @asynccontextmanager
    async def _admitted(self, context: Any) -> AsyncIterator[None]:
        """One RPC as a request of its caller; the trailing metadata says what REST says in headers."""
        async with admitted(self._tenants, self._caller(context)) as account:
            yield
            if account is not None:
                said = limit_headers(account)
                limits = ((k.decode(), v.decode()) for k, v in said)
                context.set_trailing_metadata((*context.trailing_metadata(), *limits))
