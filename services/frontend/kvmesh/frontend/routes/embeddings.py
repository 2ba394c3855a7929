"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import time

import orjson
import structlog
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kvmesh.common import metrics
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.http.client_watch import ClientWatch
from kvmesh.frontend.protocol import EmbeddingRequest, parse
from kvmesh.frontend.routes.answer import ignored_header
from kvmesh.frontend.routes.body import read_body
from kvmesh.frontend.routes.schema import body_schema
from kvmesh.frontend.serving.embeddings import Vectors, embed

log = structlog.get_logger()

router = APIRouter()


@router.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingRequest))
async def create_embeddings(request: Request) -> Response:
    """A vector for each input, text or token ids."""
    received = time.monotonic()
    gateway: Gateway = request.app.state.gateway
    body, ignored = parse(EmbeddingRequest, await read_body(request, gateway.config.max_body_bytes))
    request_id = request.state.request_id
    vectors: Vectors | None = None
    with ClientWatch(request.scope):
        vectors = await embed(gateway, body, request_id, received=received)
    if vectors is None:
        metrics.frontend().disconnects.inc()
        log.info("client left", request_id=request_id, output_tokens=0)
        # Nobody reads it.
        return Response(status_code=499)
    content = _content(vectors, as_text=body.encoding_format == "base64")
    return Response(content, media_type="application/json", headers=_headers(ignored))


def _content(vectors: Vectors, *, as_text: bool) -> bytes:
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(row.tobytes()).decode() if as_text else row,
        }
        for index, row in enumerate(vectors.rows)
    ]
    tokens = vectors.prompt_tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    body = {"object": "list", "data": data, "model": vectors.model, "usage": usage}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _headers(ignored: list[str]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in ignored_header(ignored)}
