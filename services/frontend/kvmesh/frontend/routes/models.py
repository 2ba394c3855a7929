"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.models import Model

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The models that can be asked now."""
    gateway: Gateway = request.app.state.gateway
    data = [_model_json(model) for model in gateway.models.usable()]
    return JSONResponse({"object": "list", "data": data})


# Hugging Face ids contain a slash.
@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> Response:
    """One model, by name or alias."""
    gateway: Gateway = request.app.state.gateway
    return JSONResponse(_model_json(gateway.models.resolve(name)))


def _model_json(model: Model) -> dict[str, Any]:
    return {
        "id": model.info.name,
        "object": "model",
        "created": model.created,
        "owned_by": "kvmesh",
        # Named as by vLLM and SGLang, whose clients look for it.
        "max_model_len": model.info.context_length,
        "aliases": list(model.info.aliases),
    }
