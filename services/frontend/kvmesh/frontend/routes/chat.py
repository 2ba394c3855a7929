"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.protocol import ChatCompletionRequest
from kvmesh.frontend.protocol.long import parse_long
from kvmesh.frontend.protocol.plain import request_of
from kvmesh.frontend.routes.answer import AnswerResponse
from kvmesh.frontend.routes.body import plain_body, read_body
from kvmesh.frontend.routes.schema import body_schema
from kvmesh.frontend.serving.generation import chat_answers

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=body_schema(ChatCompletionRequest))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    received = time.monotonic()
    gateway: Gateway = request.app.state.gateway
    plain = plain_body(request)
    if plain is not None:
        body, ignored = request_of(ChatCompletionRequest, plain), []
    else:
        raw = await read_body(request, gateway.config.max_body_bytes)
        body, ignored = await parse_long(ChatCompletionRequest, raw)
    request_id: str = request.state.request_id
    answers = await chat_answers(gateway, body, request_id, received=received)
    keep = partial(gateway.chats.put, gateway.owner(), body, request_id) if body.store else None
    function = body.call_is_function()
    return AnswerResponse(answers, body, ignored, chat=True, call_is_function=function, keep=keep)
