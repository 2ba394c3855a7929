"""The answer to a generation request, streamed or whole; when the client leaves, the engines stop."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import orjson
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvmesh.common import metrics, telemetry
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.call import Call
from kvmesh.frontend.client_watch import ClientWatch
from kvmesh.frontend.explain import explanation_json, usage_json
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.mesh import Mesh
from kvmesh.frontend.models import Model
from kvmesh.frontend.protocol import GenerationRequest
from kvmesh.frontend.session import Session
from kvmesh.frontend.sse import DONE, ChunkWriter, error_chunk
from kvmesh.frontend.text import TextAnswer

log = structlog.get_logger()

_MAX_IGNORED_NAMES = 32


def answer(
    request: Request,
    body: GenerationRequest,
    ignored: Sequence[str],
    model: Model,
    token_ids: Sequence[int],
    *,
    param: str,
    chat: bool,
    received: float,
    ids_from_client: bool = False,
    default_output: int | None = None,
) -> AnswerResponse:
    """The response to a valid body. Raises KvmeshError where the model cannot take it (`Gateway.call`)."""
    gateway: Gateway = request.app.state.gateway
    call = gateway.call(
        request.state.request_id,
        model,
        token_ids,
        body.sampling(),
        param=param,
        received=received,
        ids_from_client=ids_from_client,
        default_output=default_output,
        explain=body.kvmesh.explain,
        policy=body.kvmesh.policy,
        session_id=body.session_id(),
        tenant=body.kvmesh.tenant,
        priority=body.kvmesh.priority,
    )
    return AnswerResponse(gateway.mesh, call, body, ignored, chat=chat)


class AnswerResponse(Response):
    """Runs the request when it is sent: errors before the first token still become a status of their own."""

    def __init__(
        self, mesh: Mesh, call: Call, body: GenerationRequest, ignored: Sequence[str], *, chat: bool
    ) -> None:
        super().__init__()
        self._mesh = mesh
        self._call = call
        self._chat = chat
        self._stops = body.stops()
        self._stream = bool(body.stream)
        self._include_usage = body.include_usage()
        self._ignored = ignored

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = Session(self._mesh, self._call)
        try:
            async with ClientWatch(receive) as watch:
                with telemetry.span("generate", request_id=self._call.request_id):
                    await session.start()
                    text = TextAnswer(session, self._stops)
                    await (self._send_stream if self._stream else self._send_whole)(text, send)
        finally:
            session.close()
        if watch.gone:
            metrics.frontend().disconnects.inc()
            log.info("client left", request_id=self._call.request_id, output_tokens=session.output_tokens)

    async def _send_stream(self, answer: TextAnswer, send: Send) -> None:
        session = answer.session
        writer = ChunkWriter(self._head(stream=True), chat=self._chat, include_usage=self._include_usage)
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    # Proxies in front must not collect chunks.
                    (b"x-accel-buffering", b"no"),
                    *self._ignored_header(),
                ],
            }
        )
        try:
            # The role travels with the first piece of text.
            lead = writer.role() if self._chat else b""
            async for piece in answer.pieces():
                chunk = lead + writer.text(piece)
                lead = b""
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except KvmeshError as error:
            log.warning("answer broken off", request_id=self._call.request_id, error=error.message)
            await send({"type": "http.response.body", "body": error_chunk(error), "more_body": False})
            return
        explained = {"kvmesh": explanation_json(session)} if self._call.explain else None
        if self._include_usage:
            last = writer.finish(answer.finish_reason) + writer.usage(usage_json(session), explained)
        else:
            last = writer.finish(answer.finish_reason, explained)
        await send({"type": "http.response.body", "body": lead + last + DONE, "more_body": False})

    async def _send_whole(self, answer: TextAnswer, send: Send) -> None:
        session = answer.session
        text = "".join([piece async for piece in answer.pieces()])
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": answer.finish_reason}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        body = {**self._head(stream=False), "choices": [choice], "usage": usage_json(session)}
        if self._call.explain:
            body["kvmesh"] = explanation_json(session)
        content = orjson.dumps(body)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
            *self._ignored_header(),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _head(self, *, stream: bool) -> dict[str, Any]:
        kind = "chat.completion" if self._chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if stream and self._chat else kind,
            "created": int(time.time()),
            "model": self._call.model.info.name,
        }

    def _ignored_header(self) -> list[tuple[bytes, bytes]]:
        """Names are the client's: encoded to be fit for a header, and bounded."""
        if not self._ignored:
            return []
        names = [quote(name[:64], safe="") for name in self._ignored[:_MAX_IGNORED_NAMES]]
        return [(b"x-kvmesh-ignored-params", ",".join(names).encode())]
