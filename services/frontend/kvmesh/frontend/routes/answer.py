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

from kvmesh.common import metrics
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.http.client_watch import ClientWatch, Connection
from kvmesh.frontend.http.sse import DONE, ChunkWriter, error_chunk
from kvmesh.frontend.protocol import GenerationRequest
from kvmesh.frontend.serving.answers import Answers
from kvmesh.frontend.serving.best import best
from kvmesh.frontend.serving.choices import Choice, answer_head
from kvmesh.frontend.serving.explain import explanation_json, usage, usage_json
from kvmesh.frontend.serving.text import Delta

log = structlog.get_logger()

IGNORED = "x-kvmesh-ignored-params"
"""header, and over gRPC trailing metadata, that names what was accepted and changes nothing"""
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
        # What Starlette sets up is for bodies that are there already.
        self._answers = answers
        self._chat = chat
        self._call_is_function = call_is_function
        self._stream = bool(body.stream)
        self._include_usage = body.include_usage()
        self._tier = body.tier()
        self._wanted = body.wanted()
        self._shows_scores = body.shows_scores()
        self._ignored = [*ignored, *answers.ignored]
        self._keep = keep

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answers = self._answers
        request_id = answers.call.request_id
        deadline = answers.call.deadline
        with answers, ClientWatch(scope, deadline) as watch:
            events = _Events(scope, self._chunk) if self._stream else None
            async with aclosing(answers.deltas(events)) as deltas:
                await (self._send_stream(deltas, events, send) if events else self._send_whole(deltas, send))
        if watch.gone:
            metrics.frontend().disconnects.inc()
            tokens = sum(session.output_tokens for session in answers.sessions)
            log.info("client left", request_id=request_id, output_tokens=tokens)

    async def _send_stream(self, deltas: Deltas, events: _Events, send: Send) -> None:
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
        events.begin(writers, chat=self._chat, choices=self._choices() if self._keep is not None else [])
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
                chunk = events.chunk(*event)
                left -= bool(event[1].finish_reason)
                if not left:
                    break
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                event = await anext(deltas)
            if self._keep is not None:
                await self._keep({**head, "object": "chat.completion", **self._whole(events.choices)})
        except KvmeshError as error:
            log.warning("answer broken off", request_id=self._answers.call.request_id, error=error.message)
            await send({"type": "http.response.body", "body": error_chunk(error), "more_body": False})
            return
        if self._include_usage:
            chunk += writers[0].usage(self._usage(), self._explained())
        await send({"type": "http.response.body", "body": chunk + DONE, "more_body": False})

    def _chunk(self, writer: ChunkWriter, delta: Delta) -> bytes:
        chunk = b""
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
            last = len(self._answers) == 1 and not self._include_usage
            chunk += writer.finish(delta.finish_reason, self._explained() if last else None)
        return chunk

    async def _send_whole(self, deltas: Deltas, send: Send) -> None:
        choices = self._choices()
        async for number, delta in deltas:
            choices[number].add(delta)
        if self._answers.choices > self._wanted:
            choices = best(choices, self._answers, self._wanted)
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
            Choice(
                i,
                chat=self._chat,
                call_is_function=self._call_is_function,
                shows_scores=self._shows_scores,
            )
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


class _Events:
    """The chunks of a streamed answer, and the way past all layers for those of an only choice.

    Nothing on the way changes a chunk, and most come while everybody waits for one: an `Outlet`.
    """

    def __init__(self, scope: Scope, chunk: Callable[[ChunkWriter, Delta], bytes]) -> None:
        self._scope = scope
        self._connection: Connection = scope["state"]["connection"]
        self._chunk = chunk
        self._writers: list[ChunkWriter] = []
        self._leads: list[bytes] = []
        self.choices: list[Choice] = []
        """what they amount to, where that is kept"""

    def begin(self, writers: list[ChunkWriter], *, chat: bool, choices: list[Choice]) -> None:
        """Before the first chunk."""
        self._writers, self.choices = writers, choices
        # The role travels with the first piece of text.
        self._leads = [writer.role() if chat else b"" for writer in writers]

    def chunk(self, number: int, delta: Delta) -> bytes:
        lead, self._leads[number] = self._leads[number], b""
        if self.choices:
            self.choices[number].add(delta)
        return lead + self._chunk(self._writers[number], delta)

    def open(self) -> bool:
        return self._connection.can_write(self._scope)

    def put(self, delta: Delta) -> None:
        if chunk := self.chunk(0, delta):
            self._connection.write(chunk)


def ignored_header(ignored: Sequence[str]) -> list[tuple[bytes, bytes]]:
    """Names are the client's: encoded to be fit for a header, and bounded."""
    if not ignored:
        return []
    names = [quote(name[:64], safe="") for name in ignored[:_MAX_IGNORED_NAMES]]
    return [(IGNORED.encode(), ",".join(names).encode())]
