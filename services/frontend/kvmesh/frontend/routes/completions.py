"""POST /v1/completions."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.protocol import CompletionRequest, parse
from kvmesh.frontend.protocol.plain import request_of
from kvmesh.frontend.routes.answer import AnswerResponse
from kvmesh.frontend.routes.body import plain_body, read_body
from kvmesh.frontend.routes.schema import body_schema
from kvmesh.frontend.serving.generation import completion_answers

router = APIRouter()


@router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continue prompts, text or token ids."""
    received = time.monotonic()
    gateway: Gateway = request.app.state.gateway
    plain = plain_body(request)
    if plain is not None:
        body, ignored = request_of(CompletionRequest, plain), []
    else:
        body, ignored = parse(CompletionRequest, await read_body(request, gateway.config.max_body_bytes))
    answers = await completion_answers(gateway, body, request.state.request_id, received=received)
    return AnswerResponse(answers, body, ignored, chat=False)
