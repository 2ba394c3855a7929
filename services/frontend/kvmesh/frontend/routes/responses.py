"""POST /v1/responses, and what can be done with one that is stored."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvmesh.common.errors import invalid
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.protocol import parse
from kvmesh.frontend.responses.answer import EventsResponse, WholeResponse
from kvmesh.frontend.responses.compaction import CompactRequest
from kvmesh.frontend.responses.prepare import count, prepare, prepare_compaction
from kvmesh.frontend.responses.request import InputTokensRequest, ResponsesRequest
from kvmesh.frontend.routes.answer import ignored_header
from kvmesh.frontend.routes.body import read_body
from kvmesh.frontend.routes.paging import PAGING, paging
from kvmesh.frontend.routes.schema import body_schema, query_schema

router = APIRouter()


@router.post("/v1/responses", openapi_extra=body_schema(ResponsesRequest))
async def create_response(request: Request) -> Response:
    """Answer an input, or go on with a response that is stored."""
    received = time.monotonic()
    gateway: Gateway = request.app.state.gateway
    body, _ = parse(ResponsesRequest, await read_body(request, gateway.config.max_body_bytes))
    owner = gateway.owner()
    generation = await prepare(gateway, body, request.state.request_id, owner, received=received)
    ignored = [*body.ignored(), *generation.answers.ignored]
    if body.background:
        run = await gateway.runs.start(generation, owner)
        if body.stream:
            return EventsResponse(run.follow(), ignored)
        headers = {name.decode(): value.decode() for name, value in ignored_header(ignored)}
        return JSONResponse(generation.response, headers=headers)
    if body.stream:
        return EventsResponse(generation.frames(), ignored, generation.answers.call.deadline)
    return WholeResponse(generation.result(), request.state.request_id, ignored)


@router.post("/v1/responses/compact", openapi_extra=body_schema(CompactRequest))
async def compact_conversation(request: Request) -> Response:
    """A conversation made shorter, to be given as the input of its next response."""
    received = time.monotonic()
    gateway: Gateway = request.app.state.gateway
    body, _ = parse(CompactRequest, await read_body(request, gateway.config.max_body_bytes))
    request_id: str = request.state.request_id
    compaction = await prepare_compaction(gateway, body, request_id, gateway.owner(), received=received)
    return WholeResponse(compaction.result(), request_id, body.ignored())


@router.post("/v1/responses/input_tokens", openapi_extra=body_schema(InputTokensRequest))
async def count_input_tokens(request: Request) -> Response:
    """Tokens of the prompt that a response would be given."""
    gateway: Gateway = request.app.state.gateway
    body, _ = parse(InputTokensRequest, await read_body(request, gateway.config.max_body_bytes))
    tokens = await count(gateway, body, gateway.owner())
    return JSONResponse({"object": "response.input_tokens", "input_tokens": tokens})


@router.get(
    "/v1/responses/{id}",
    openapi_extra=query_schema(stream={"type": "boolean"}, starting_after={"type": "integer"}),
)
async def get_response(request: Request, id: str) -> Response:
    """A stored response; with `stream`, the events of one that is or was generated in the background."""
    gateway: Gateway = request.app.state.gateway
    owner = gateway.owner()
    kept = await gateway.kept.get(owner, id)
    if request.query_params.get("stream") != "true":
        run = gateway.runs.find(owner, id)
        return JSONResponse(run.generation.response if run is not None else kept.response)
    after = request.query_params.get("starting_after", "-1")
    if not after.removeprefix("-").isdecimal():
        raise invalid("starting_after must be a sequence number", "starting_after")
    return EventsResponse(gateway.runs.follow(owner, id, max(0, int(after) + 1)))


@router.delete("/v1/responses/{id}")
async def delete_response(request: Request, id: str) -> Response:
    """Forget a response; one that is being generated is ended."""
    gateway: Gateway = request.app.state.gateway
    owner = gateway.owner()
    await gateway.kept.delete(owner, id)
    await gateway.runs.forget(owner, id)
    return JSONResponse({"id": id, "object": "response", "deleted": True})


@router.post("/v1/responses/{id}/cancel")
async def cancel_response(request: Request, id: str) -> Response:
    """End a response that is generated in the background; one that has ended stays as it is."""
    gateway: Gateway = request.app.state.gateway
    owner = gateway.owner()
    kept = await gateway.kept.get(owner, id)
    if not kept.response["background"]:
        raise invalid("only a response that was asked for with `background` can be cancelled", "id")
    return JSONResponse((await gateway.runs.cancel(owner, id)).response)


@router.get("/v1/responses/{id}/input_items", openapi_extra=query_schema(**PAGING))
async def list_input_items(request: Request, id: str) -> Response:
    """The items of a stored response's own input, the last one first unless `order` is asc."""
    gateway: Gateway = request.app.state.gateway
    kept = await gateway.kept.get(gateway.owner(), id)
    return JSONResponse(paging(request, "desc").cut(kept.items))
