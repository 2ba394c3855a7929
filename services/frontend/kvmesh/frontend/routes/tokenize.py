"""POST /v1/tokenize and /v1/detokenize, named and shaped as by vLLM and SGLang."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvmesh.common.errors import invalid
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.protocol import ChatCompletionRequest
from kvmesh.frontend.protocol.body import TokenId, parse, validate
from kvmesh.frontend.routes.body import read_body
from kvmesh.frontend.routes.schema import body_schema
from kvmesh.frontend.serving.call import check_ids

router = APIRouter()


class TokenizeRequest(BaseModel):
    """Body of /v1/tokenize: a prompt, or the messages of a chat."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str = Field(min_length=1)
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    """rendered by the model's template, as a chat completion would have them"""
    add_special_tokens: bool = True
    """begin a prompt with the special tokens that the model wants; a template writes its own"""


class DetokenizeRequest(BaseModel):
    """Body of /v1/detokenize."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str = Field(min_length=1)
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
    skip_special_tokens: bool = False


@router.post("/v1/tokenize", openapi_extra=body_schema(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt or a chat, as the model would get them."""
    gateway: Gateway = request.app.state.gateway
    body, _ = parse(TokenizeRequest, await read_body(request, gateway.config.max_body_bytes))
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt or messages is required, one of them", "prompt")
    model = gateway.model(body.model)
    if body.prompt is not None:
        tokens = await model.tokenizer.encode(body.prompt, body.add_special_tokens)
    else:
        fields = {**(body.model_extra or {}), "model": body.model, "messages": body.messages}
        chat, _ = validate(ChatCompletionRequest, fields)
        tokens = await model.tokenizer.encode_chat(
            chat.conversation(), chat.template_args(), gateway.cache_scope()
        )
    answer = {"tokens": tokens, "count": len(tokens), "max_model_len": model.info.context_length}
    return JSONResponse(answer)


@router.post("/v1/detokenize", openapi_extra=body_schema(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of token ids: `text` as SGLang, `prompt` as vLLM calls it."""
    gateway: Gateway = request.app.state.gateway
    body, _ = parse(DetokenizeRequest, await read_body(request, gateway.config.max_body_bytes))
    model = gateway.model(body.model)
    check_ids(model, body.tokens, "tokens")
    text = await model.tokenizer.decode(body.tokens, body.skip_special_tokens)
    return JSONResponse({"text": text, "prompt": text})
