"""Chat completions that were asked for with `store`: listed, read, labelled, deleted."""

from __future__ import annotations

import re

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.protocol import Body, parse
from kvmesh.frontend.protocol.generation import Metadata
from kvmesh.frontend.routes.body import read_body
from kvmesh.frontend.routes.paging import PAGING, listed, paging
from kvmesh.frontend.routes.schema import body_schema, query_schema

router = APIRouter()

_METADATA = re.compile(r"metadata\[(.*)\]")


class UpdateRequest(Body):
    """Body of an update: nothing but the labels can be changed."""

    metadata: Metadata | None


@router.get("/v1/chat/completions", openapi_extra=query_schema(**PAGING, model={"type": "string"}))
async def list_chat_completions(request: Request) -> Response:
    """Stored chat completions, the oldest first unless `order` is desc; by `model` and `metadata[NAME]`."""
    gateway: Gateway = request.app.state.gateway
    asked, query = paging(request, "asc"), request.query_params
    metadata = {found[1]: value for name, value in query.items() if (found := _METADATA.fullmatch(name))}
    model = _model_name(gateway, query.get("model", ""))
    page = await gateway.chats.page(
        gateway.owner(), model, metadata, asked.after, asked.limit, newest_first=asked.newest_first
    )
    return JSONResponse(listed(page.completions, more=page.more))


@router.get("/v1/chat/completions/{id}")
async def get_chat_completion(request: Request, id: str) -> Response:
    """A stored chat completion."""
    gateway: Gateway = request.app.state.gateway
    return JSONResponse(await gateway.chats.get(gateway.owner(), id))


@router.post("/v1/chat/completions/{id}", openapi_extra=body_schema(UpdateRequest))
async def update_chat_completion(request: Request, id: str) -> Response:
    """Replace the metadata of a stored chat completion."""
    gateway: Gateway = request.app.state.gateway
    body, _ = parse(UpdateRequest, await read_body(request, gateway.config.max_body_bytes))
    return JSONResponse(await gateway.chats.update(gateway.owner(), id, body.metadata or {}))


@router.delete("/v1/chat/completions/{id}")
async def delete_chat_completion(request: Request, id: str) -> Response:
    """Forget a stored chat completion."""
    gateway: Gateway = request.app.state.gateway
    await gateway.chats.delete(gateway.owner(), id)
    return JSONResponse({"object": "chat.completion.deleted", "id": id, "deleted": True})


@router.get("/v1/chat/completions/{id}/messages", openapi_extra=query_schema(**PAGING))
async def list_chat_messages(request: Request, id: str) -> Response:
    """The messages that a stored chat completion answers, the first one first unless `order` is desc."""
    gateway: Gateway = request.app.state.gateway
    messages = await gateway.chats.messages(gateway.owner(), id)
    return JSONResponse(paging(request, "asc").cut(messages))


def _model_name(gateway: Gateway, name: str) -> str:
    """The name of the model an alias means; one that is not served now may have stored some."""
    try:
        return gateway.models.resolve(name).name if name else ""
    except KvmeshError:
        return name
