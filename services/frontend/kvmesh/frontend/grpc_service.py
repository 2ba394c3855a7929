"""FrontendService: the same requests as REST, on the same path, with the same errors."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import grpc

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.frontend.call import Call, new_request_id
from kvmesh.frontend.explain import explanation, usage
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.protocol import SamplingFields, StopFields, validate
from kvmesh.frontend.session import Session
from kvmesh.frontend.text import TextAnswer
from kvmesh.v1.engine_pb2 import FINISH_REASON_STOP, SamplingParams
from kvmesh.v1.frontend_pb2 import (
    ChatRequest,
    ChatResponse,
    Explanation,
    FrontendServiceGenerateRequest,
    FrontendServiceGenerateResponse,
    ListModelsRequest,
    ListModelsResponse,
)
from kvmesh.v1.frontend_pb2_grpc import FrontendServiceServicer

_ROLES = ("system", "user", "assistant")
# Names of fields where REST's differ.
_REST_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
_PROTO_NAMES = {rest: proto for proto, rest in _REST_NAMES.items()}


class FrontendService(FrontendServiceServicer):
    """Calls end with the client's deadline or the configured one, whichever is sooner."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Chat(self, request: ChatRequest, context: Any) -> AsyncIterator[ChatResponse]:
        received = time.monotonic()
        if not request.messages:
            raise invalid("messages must not be empty", "messages")
        for i, message in enumerate(request.messages):
            if message.role not in _ROLES:
                raise invalid(f"messages[{i}].role must be one of {', '.join(_ROLES)}", f"messages[{i}].role")
        validate(StopFields, {"stop": list(request.stop)})
        sampling = check_sampling(request.sampling)
        model = self._gateway.models.resolve(request.model)
        messages = [{"role": m.role, "content": m.content} for m in request.messages]
        call = self._gateway.call(
            _request_id(context),
            model,
            await model.tokenizer.encode_chat(messages, {}),
            sampling,
            param="messages",
            received=received,
            timeout_s=context.time_remaining(),
            explain=request.explain,
        )
        with closing(Session(self._gateway.mesh, call)) as session:
            await session.start()
            answer = TextAnswer(session, request.stop)
            async for piece in answer.pieces():
                yield ChatResponse(text=piece)
            yield ChatResponse(
                finish_reason=answer.finish_reason, usage=usage(session), kvmesh=_explanation(call, session)
            )

    async def Generate(
        self, request: FrontendServiceGenerateRequest, context: Any
    ) -> AsyncIterator[FrontendServiceGenerateResponse]:
        sampling = check_sampling(request.sampling)
        model = self._gateway.models.resolve(request.model)
        call = self._gateway.call(
            _request_id(context),
            model,
            request.token_ids,
            sampling,
            param="token_ids",
            ids_from_client=True,
            timeout_s=context.time_remaining(),
            explain=request.explain,
        )
        with closing(Session(self._gateway.mesh, call)) as session:
            await session.start()
            while not session.finished:
                if tokens := await session.next():
                    yield FrontendServiceGenerateResponse(token_ids=tokens)
            finish = session.finish
            stopped = finish is not None and finish.reason == FINISH_REASON_STOP
            yield FrontendServiceGenerateResponse(
                finish_reason="stop" if stopped else "length",
                usage=usage(session),
                kvmesh=_explanation(call, session),
            )

    async def ListModels(self, request: ListModelsRequest, context: Any) -> ListModelsResponse:
        return ListModelsResponse(models=[model.info for model in self._gateway.models.usable()])


def check_sampling(given: SamplingParams) -> SamplingParams:
    """A copy of the client's parameters, checked by REST's rules. Raises KvmeshError with `param`."""
    fields = {}
    for field, value in given.ListFields():
        name = field.name
        fields[_REST_NAMES.get(name, name)] = list(value) if name == "stop_token_ids" else value
    try:
        request, _ = validate(SamplingFields, fields)
    except KvmeshError as error:
        rest = error.param or ""
        param = f"sampling.{_PROTO_NAMES.get(rest, rest)}"
        raise invalid(error.message.replace(rest, param, 1), param) from None
    return request.sampling()


def _explanation(call: Call, session: Session) -> Explanation | None:
    return explanation(session) if call.explain else None


def _request_id(context: grpc.aio.ServicerContext) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == "x-request-id" and isinstance(value, str) and value:
            return value[:128]
    return new_request_id()
