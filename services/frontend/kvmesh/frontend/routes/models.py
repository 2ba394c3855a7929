"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.models import Model
from kvmesh.frontend.tenants.contract import CALLER
from kvmesh.v1.common_pb2 import CAPABILITY_CONSTRAIN, CAPABILITY_LOGPROBS

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The models that can be asked now."""
    gateway: Gateway = request.app.state.gateway
    listed = [one for model in gateway.models.usable() for one in (model, *gateway.models.adapters_of(model))]
    data = [_model_json(gateway, model) for model in listed if _may_ask(gateway, model)]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse({"object": "list", "data": data, "has_more": False, **ends})


# Hugging Face ids contain a slash.
@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> Response:
    """One model, by name or alias: how long its context is, and what it can be asked."""
    if not name:
        raise HTTPException(404)
    gateway: Gateway = request.app.state.gateway
    model = gateway.models.resolve(name)
    if gateway.tenants is not None:
        gateway.tenants.check_model(CALLER.get(), gateway.models.names_of(model))
    return JSONResponse(_model_json(gateway, model))


def _may_ask(gateway: Gateway, model: Model) -> bool:
    key = CALLER.get().key
    return key is None or key.allows(gateway.models.names_of(model))


def _model_json(gateway: Gateway, model: Model) -> dict[str, Any]:
    chat = model.generates and model.tokenizer.has_chat_template
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "kvmesh",
        # The same as Anthropic's clients read it.
        "type": "model",
        "display_name": model.name,
        "created_at": datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "max_input_tokens": model.info.context_length,
        "max_tokens": model.info.context_length,
        # Of an adapter: the model that it is for.
        "parent": model.info.name if model.adapter else None,
        # Named as by vLLM and SGLang, whose clients look for it.
        "max_model_len": model.info.context_length,
        "context_length": model.info.context_length,
        "vocab_size": model.info.vocab_size,
        "aliases": list(gateway.models.names_of(model)[1:]),
        "capabilities": {
            "chat": chat,
            "completions": model.generates,
            "embeddings": model.embeds,
            "tokenize": True,
            "streaming": model.generates,
            "constraints": model.can(CAPABILITY_CONSTRAIN),
            "logprobs": model.can(CAPABILITY_LOGPROBS),
        },
        **({"embedding_size": model.info.embedding_size} if model.embeds else {}),
    }
