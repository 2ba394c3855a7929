"""POST /v1/completions."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.protocol import CompletionRequest, parse
from kvmesh.frontend.routes.answer import answer
from kvmesh.frontend.routes.body import read_body
from kvmesh.frontend.routes.schema import body_schema

router = APIRouter()

# OpenAI's, for this endpoint only.
_DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """Continue a prompt, text or token ids."""
    received = time.monotonic()
    gateway: Gateway = request.app.state.gateway
    body, ignored = parse(CompletionRequest, await read_body(request, gateway.config.max_body_bytes))
    prompt = body.one_prompt()
    model = gateway.models.resolve(body.model)
    return answer(
        request,
        body,
        ignored,
        model,
        await model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt,
        param="prompt",
        chat=False,
        received=received,
        ids_from_client=not isinstance(prompt, str),
        default_output=_DEFAULT_MAX_TOKENS,
    )
