"""The client for asyncio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from types import TracebackType
from typing import Any

import grpc.aio

from kvmesh.client.connection import OPTIONS, Tls, metadata
from kvmesh.client.errors import request_errors
from kvmesh.client.requests import Input, Message, chat_request, complete_request, embed_request
from kvmesh.v1.common_pb2 import ModelInfo
from kvmesh.v1.frontend_pb2 import ChatResponse, CompleteResponse, ListModelsRequest
from kvmesh.v1.frontend_pb2_grpc import FrontendServiceStub


class AsyncClient:
    """As `Client`, of one event loop."""

    def __init__(
        self,
        address: str = "localhost:8001",
        *,
        api_key: str = "",
        tls: Tls | None = None,
        timeout: float = 600.0,
    ) -> None:
        self._channel = (
            grpc.aio.insecure_channel(address, options=OPTIONS)
            if tls is None
            else grpc.aio.secure_channel(address, tls.credentials(), options=tls.options())
        )
        self._stub: Any = FrontendServiceStub(self._channel)
        self._call: dict[str, Any] = {"timeout": timeout, "metadata": metadata(api_key)}

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what still runs."""
        await self._channel.close()

    async def chat(
        self, messages: Iterable[Message], *, model: str = "default", **fields: Any
    ) -> AsyncGenerator[ChatResponse]:
        """As `Client.chat`. Closing the generator cancels the answer."""
        async for piece in self._stream(self._stub.Chat, chat_request(model, messages, fields)):
            yield piece

    async def complete(
        self, prompts: Input | Sequence[Input], *, model: str = "default", **fields: Any
    ) -> AsyncGenerator[CompleteResponse]:
        """As `Client.complete`."""
        async for piece in self._stream(self._stub.Complete, complete_request(model, prompts, fields)):
            yield piece

    async def embed(
        self, inputs: Input | Sequence[Input], *, model: str = "default", dimensions: int = 0
    ) -> list[list[float]]:
        """As `Client.embed`."""
        with request_errors():
            answer = await self._stub.Embed(embed_request(model, inputs, dimensions), **self._call)
        return [list(one.values) for one in answer.embeddings]

    async def models(self) -> list[ModelInfo]:
        """As `Client.models`."""
        with request_errors():
            return list((await self._stub.ListModels(ListModelsRequest(), **self._call)).models)

    async def _stream(self, method: Any, request: Any) -> AsyncGenerator[Any]:
        call = method(request, **self._call)
        try:
            with request_errors():
                async for piece in call:
                    yield piece
        finally:
            call.cancel()
