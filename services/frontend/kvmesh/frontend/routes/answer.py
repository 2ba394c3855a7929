"""The answers to a generation request, streamed or whole; when the client leaves, the engines stop."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

import orjson
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvmesh.common import metrics, telemetry
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.http.client_watch import ClientWatch
from kvmesh.frontend.http.sse import DONE, ChunkWriter, error_chunk
from kvmesh.frontend.protocol import GenerationRequest
from kvmesh.frontend.serving.answers import Answers
from kvmesh.frontend.serving.choices import Choice, answer_head
from kvmesh.frontend.serving.explain import explanation_json, usage, usage_json
from kvmesh.frontend.serving.text import Delta

log = structlog.get_logger()

_MAX_IGNORED_NAMES = 32

Deltas = AsyncGenerator[tuple[int, Delta]]
# Keeps the whole answer before its client is told its end. May raise KvmeshError.
Keep = Callable[[dict[str, Any]], Awaitable[None]]


class AnswerResponse(Response):
    """Runs the request when it is sent: errors before the first token still become a status of their own."""

    def __init__(
        self,
        answers: Answers,
        body: GenerationRequest,
        ignored: Sequence[str],
        *,
        chat: bool,
        call_is_function: bool = False,
        keep: Keep | None = None,
    ) -> None:
        """`call_is_function`: a call is spelled `function_call`."""
        super().__init__()
        self._answers = answers
        self._chat = chat
        self._call_is_function = call_is_function
        self._stream = bool(body.stream)
        self._include_usage = body.include_usage()
        self._tier = body.tier()
        self._ignored = ignored
        self._keep = keep

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answers = self._answers
        request_id = answers.call.request_id
        with answers, ClientWatch(scope) as watch, telemetry.span("generate", request_id=request_id):
            async with aclosing(answers.deltas()) as deltas:
                await (self._send_stream if self._stream else self._send_whole)(deltas, send)
        if watch.gone:
            metrics.frontend().disconnects.inc()
            tokens = sum(session.output_tokens for session in answers.sessions)
            log.info("client left", request_id=request_id, output_tokens=tokens)

    async def _send_stream(self, deltas: Deltas, send: Send) -> None:
        # Fails as long as nothing has been sent.
        first = await anext(deltas)
        head = self._head(stream=True)
        writers = [
            ChunkWriter(
                head,
                chat=self._chat,
                include_usage=self._include_usage,
                index=i,
                call_is_function=self._call_is_function,
            )
            for i in range(len(self._answers.sessions))
        ]
        # The role travels with the first piece of text.
        leads = [writer.role() if self._chat else b"" for writer in writers]
        choices = self._choices() if self._keep is not None else []
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    # Proxies in front must not collect chunks.
                    (b"x-accel-buffering", b"no"),
                    *ignored_header(self._ignored),
                ],
            }
        )
        event, left = first, len(writers)
        try:
            while True:
                chunk = self._chunk(event, writers, leads)
                if choices:
                    choices[event[0]].add(event[1])
                left -= bool(event[1].finish_reason)
                if not left:
                    break
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                event = await anext(deltas)
            if self._keep is not None:
                await self._keep({**head, "object": "chat.completion", **self._whole(choices)})
        except KvmeshError as error:
            log.warning("answer broken off", request_id=self._answers.call.request_id, error=error.message)
            await send({"type": "http.response.body", "body": error_chunk(error), "more_body": False})
            return
        if self._include_usage:
            chunk += writers[0].usage(self._usage(), self._explained())
        await send({"type": "http.response.body", "body": chunk + DONE, "more_body": False})

    def _chunk(self, event: tuple[int, Delta], writers: list[ChunkWriter], leads: list[bytes]) -> bytes:
        number, delta = event
        writer = writers[number]
        chunk, leads[number] = leads[number], b""
        scores = delta.scores
        if delta.reasoning:
            chunk += writer.reasoning(delta.reasoning, scores)
            scores = ()
        if delta.text or (scores and not delta.calls):
            chunk += writer.text(delta.text, scores)
            scores = ()
        if delta.calls:
            chunk += writer.calls(delta.calls, scores)
        if delta.finish_reason:
            last = len(writers) == 1 and not self._include_usage
            chunk += writer.finish(delta.finish_reason, self._explained() if last else None)
        return chunk

    async def _send_whole(self, deltas: Deltas, send: Send) -> None:
        choices = self._choices()
        async for number, delta in deltas:
            choices[number].add(delta)
        body = {**self._head(stream=False), **self._whole(choices)}
        if self._keep is not None:
            await self._keep(body)
        content = orjson.dumps({**body, **(self._explained() or {})})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
            *ignored_header(self._ignored),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _choices(self) -> list[Choice]:
        return [
            Choice(i, chat=self._chat, call_is_function=self._call_is_function)
            for i in range(len(self._answers.sessions))
        ]

    def _whole(self, choices: list[Choice]) -> dict[str, Any]:
        """What a whole answer has beside its head."""
        return {"choices": [choice.json() for choice in choices], "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        return usage_json(usage(self._answers))

    def _explained(self) -> dict[str, Any] | None:
        """Of the first choice."""
        if not self._answers.call.explain:
            return None
        return {"kvmesh": explanation_json(self._answers.sessions[0])}

    def _head(self, *, stream: bool) -> dict[str, Any]:
        head = answer_head(self._answers, chat=self._chat, tier=self._tier)
        return head | {"object": "chat.completion.chunk"} if stream and self._chat else head


def ignored_header(ignored: Sequence[str]) -> list[tuple[bytes, bytes]]:
    """Names are the client's: encoded to be fit for a header, and bounded."""
    if not ignored:
        return []
    names = [quote(name[:64], safe="") for name in ignored[:_MAX_IGNORED_NAMES]]
    return [(b"x-kvmesh-ignored-params", ",".join(names).encode())]
