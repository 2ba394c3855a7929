"""The client for threads."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from types import TracebackType
from typing import Any

import grpc

from kvmesh.client.connection import OPTIONS, Tls, metadata
from kvmesh.client.errors import request_errors
from kvmesh.client.requests import Input, Message, chat_request, complete_request, embed_request
from kvmesh.v1.common_pb2 import ModelInfo
from kvmesh.v1.frontend_pb2 import ChatResponse, CompleteResponse, ListModelsRequest
from kvmesh.v1.frontend_pb2_grpc import FrontendServiceStub


class Client:
    """Every method raises RequestError, and takes at most `timeout` seconds. Close it, or use it as a
    context."""

    def __init__(
        self,
        address: str = "localhost:8001",
        *,
        api_key: str = "",
        tls: Tls | None = None,
        timeout: float = 600.0,
    ) -> None:
        """`address` is host:port of the frontend's gRPC server."""
        self._channel = (
            grpc.insecure_channel(address, options=OPTIONS)
            if tls is None
            else grpc.secure_channel(address, tls.credentials(), options=tls.options())
        )
        self._stub: Any = FrontendServiceStub(self._channel)
        self._call: dict[str, Any] = {"timeout": timeout, "metadata": metadata(api_key)}

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what still runs."""
        self._channel.close()

    def chat(
        self, messages: Iterable[Message], *, model: str = "default", **fields: Any
    ) -> Generator[ChatResponse, None, None]:
        """An answer as it comes; the last piece has `usage`. `fields` are ChatRequest's and SamplingParams',
        e.g. `max_new_tokens`, `temperature`, `stop`. Leaving the loop cancels the answer."""
        yield from self._stream(self._stub.Chat, chat_request(model, messages, fields))

    def complete(
        self, prompts: Input | Sequence[Input], *, model: str = "default", **fields: Any
    ) -> Generator[CompleteResponse, None, None]:
        """What goes on from one prompt, or from several, told apart by `index`; otherwise like `chat`."""
        yield from self._stream(self._stub.Complete, complete_request(model, prompts, fields))

    def embed(
        self, inputs: Input | Sequence[Input], *, model: str = "default", dimensions: int = 0
    ) -> list[list[float]]:
        """A vector of length 1 for each input; `dimensions` 0: all that it has."""
        with request_errors():
            answer = self._stub.Embed(embed_request(model, inputs, dimensions), **self._call)
        return [list(one.values) for one in answer.embeddings]

    def models(self) -> list[ModelInfo]:
        """Those that can be asked now."""
        with request_errors():
            return list(self._stub.ListModels(ListModelsRequest(), **self._call).models)

    def _stream(self, method: Any, request: Any) -> Generator[Any, None, None]:
        call = method(request, **self._call)
        try:
            with request_errors():
                yield from call
        finally:
            call.cancel()
