"""POST /v1/messages and /v1/messages/count_tokens, Anthropic's."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvmesh.frontend.anthropic.answer import MessageResponse
from kvmesh.frontend.anthropic.request import NAMES, CountTokensRequest, MessagesRequest
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.protocol import parse
from kvmesh.frontend.protocol.renamed import renamed
from kvmesh.frontend.routes.body import read_body
from kvmesh.frontend.routes.schema import body_schema
from kvmesh.frontend.serving.generation import chat_answers

router = APIRouter()


@router.post("/v1/messages", openapi_extra=body_schema(MessagesRequest))
async def create_message(request: Request) -> Response:
    """Answer a conversation, as Anthropic's Messages API does."""
    received = time.monotonic()
    gateway: Gateway = request.app.state.gateway
    request_id: str = request.state.request_id
    body, _ = parse(MessagesRequest, await read_body(request, gateway.config.max_body_bytes))
    chat = body.chat()
    with renamed(NAMES):
        answers = await chat_answers(gateway, chat, request_id, received=received)
    return MessageResponse(answers, body)


@router.post("/v1/messages/count_tokens", openapi_extra=body_schema(CountTokensRequest))
async def count_tokens(request: Request) -> Response:
    """Tokens of the prompt that a conversation would be."""
    gateway: Gateway = request.app.state.gateway
    body, _ = parse(CountTokensRequest, await read_body(request, gateway.config.max_body_bytes))
    chat = body.chat()
    with renamed(NAMES):
        chat.check()
        model = gateway.model(chat.model)
        prompt = await model.tokenizer.encode_chat(
            chat.conversation(), chat.template_args(), gateway.cache_scope()
        )
    # What Anthropic's clients call it.
    return JSONResponse({"input_tokens": len(prompt)}, headers={"request-id": request.state.request_id})
