"""An answer sent in Anthropic's way, streamed or whole; when the client leaves, the engines stop."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import orjson
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvmesh.common import metrics
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.anthropic.errors import error_json
from kvmesh.frontend.anthropic.message import Message, Thoughts, event_bytes
from kvmesh.frontend.anthropic.request import NAMES, MessagesRequest
from kvmesh.frontend.http.client_watch import ClientWatch
from kvmesh.frontend.protocol.renamed import renamed
from kvmesh.frontend.routes.answer import ignored_header
from kvmesh.frontend.serving.answers import Answers
from kvmesh.frontend.serving.explain import explanation_json
from kvmesh.frontend.serving.text import Delta

log = structlog.get_logger()

Deltas = AsyncGenerator[tuple[int, Delta]]


class MessageResponse(Response):
    """Runs the request when it is sent: errors before the first token still become a status of their own."""

    def __init__(self, answers: Answers, body: MessagesRequest) -> None:
        super().__init__()
        self._answers = answers
        self._stream = bool(body.stream)
        self._wanted = body.max_tokens
        self._thoughts: Thoughts = body.thoughts()
        self._ignored = [*body.ignored(), *answers.ignored]
        self._request_id = answers.call.request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with (
            renamed(NAMES),
            self._answers as answers,
            ClientWatch(scope, self._answers.call.deadline) as watch,
        ):
            async with aclosing(answers.deltas()) as deltas:
                first = await anext(deltas)
                send_all = self._send_stream if self._stream else self._send_whole
                await send_all(first, deltas, send)
        if watch.gone:
            metrics.frontend().disconnects.inc()
            tokens = sum(session.output_tokens for session in self._answers.sessions)
            log.info("client left", request_id=self._request_id, output_tokens=tokens)

    async def _send_stream(self, first: tuple[int, Delta], deltas: Deltas, send: Send) -> None:
        message = self._message()
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            # Proxies in front must not collect chunks.
            (b"x-accel-buffering", b"no"),
            *self._headers(),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        events, delta = message.start(), first[1]
        try:
            while True:
                events += message.add(delta)
                if delta.finish_reason:
                    events += message.finish(delta.finish_reason, self._answers.matched(0))
                    break
                if events:
                    await send({"type": "http.response.body", "body": event_bytes(events), "more_body": True})
                events, (_, delta) = [], await anext(deltas)
        except KvmeshError as error:
            log.warning("answer broken off", request_id=self._request_id, error=error.message)
            events.append(error_json(error, self._request_id))
        await send({"type": "http.response.body", "body": event_bytes(events), "more_body": False})

    async def _send_whole(self, first: tuple[int, Delta], deltas: Deltas, send: Send) -> None:
        message = self._message()
        delta = first[1]
        message.add(delta)
        while not delta.finish_reason:
            _, delta = await anext(deltas)
            message.add(delta)
        message.finish(delta.finish_reason, self._answers.matched(0))
        body = message.json()
        if self._answers.call.explain:
            body["kvmesh"] = explanation_json(self._answers.sessions[0])
        content = orjson.dumps(body)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
            *self._headers(),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _message(self) -> Message:
        return Message(self._answers.call.model.name, self._answers, self._wanted, self._thoughts)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        # What Anthropic's clients call it.
        return [(b"request-id", self._request_id.encode()), *ignored_header(self._ignored)]
