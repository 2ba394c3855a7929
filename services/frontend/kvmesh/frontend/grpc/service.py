"""FrontendService: the same requests as REST, on the same path, with the same errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.grpc.bodies import (
    chat_body,
    completion_body,
    embedding_body,
    proto_names,
    tokens_body,
)
from kvmesh.frontend.protocol import ChatCompletionRequest
from kvmesh.frontend.routes.answer import IGNORED
from kvmesh.frontend.serving.answers import Answers
from kvmesh.frontend.serving.call import new_request_id
from kvmesh.frontend.serving.choices import Choice, answer_head
from kvmesh.frontend.serving.embeddings import embed
from kvmesh.frontend.serving.explain import explanation, usage, usage_json
from kvmesh.frontend.serving.generation import chat_answers, completion_answers, token_answers
from kvmesh.frontend.serving.scores import Score
from kvmesh.frontend.serving.text import Delta
from kvmesh.v1.engine_pb2 import FINISH_REASON_STOP
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.frontend_pb2 import (
    ChatRequest,
    ChatResponse,
    CompleteRequest,
    CompleteResponse,
    Embedding,
    EmbedRequest,
    EmbedResponse,
    FrontendServiceGenerateRequest,
    FrontendServiceGenerateResponse,
    ListModelsRequest,
    ListModelsResponse,
    TokenScore,
    ToolCallDelta,
    TopToken,
    Usage,
)
from kvmesh.v1.frontend_pb2_grpc import FrontendServiceServicer

# Beyond a call's deadline, for its client to take the error that says so.
_LAST_WORDS_S = 0.5


class FrontendService(FrontendServiceServicer):
    """Calls end with the client's deadline or the configured one, whichever is sooner."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Chat(self, request: ChatRequest, context: Any) -> AsyncIterator[ChatResponse]:
        received = time.monotonic()
        with proto_names():
            body, request_id = chat_body(request), _request_id(context)
            answers = await chat_answers(
                self._gateway,
                body,
                request_id,
                received=received,
                timeout_s=context.time_remaining(),
            )
            if answers.ignored:
                context.set_trailing_metadata(((IGNORED, ",".join(answers.ignored)),))
            kept = [Choice(i, chat=True) for i in range(len(answers))] if body.store else []
            async with aclosing(_deltas(answers)) as deltas:
                async for number, delta, last in deltas:
                    if kept:
                        kept[number].add(delta)
                    response = ChatResponse(
                        index=number,
                        text=delta.text,
                        reasoning=delta.reasoning,
                        finish_reason=delta.finish_reason,
                        tool_calls=[
                            ToolCallDelta(index=c.index, id=c.id, name=c.name, arguments=c.arguments)
                            for c in delta.calls
                        ],
                        logprobs=map(_score, delta.scores),
                    )
                    if last:
                        _end(response, answers)
                        if kept:
                            response.stored_id = await self._keep(body, request_id, answers, kept)
                    yield response

    async def _keep(
        self, body: ChatCompletionRequest, request_id: str, answers: Answers, choices: list[Choice]
    ) -> str:
        """Store a completion as REST's clients would have read it; returns its id. Raises KvmeshError."""
        completion = answer_head(answers, chat=True, tier=body.tier())
        completion |= {
            "choices": [choice.json() for choice in choices],
            "usage": usage_json(usage(answers)),
        }
        await self._gateway.chats.put(self._gateway.owner(), body, request_id, completion)
        return completion["id"]

    async def Complete(self, request: CompleteRequest, context: Any) -> AsyncIterator[CompleteResponse]:
        received = time.monotonic()
        with proto_names():
            answers = await completion_answers(
                self._gateway,
                completion_body(request),
                _request_id(context),
                received=received,
                timeout_s=context.time_remaining(),
            )
            async with aclosing(_deltas(answers)) as deltas:
                async for number, delta, last in deltas:
                    response = CompleteResponse(
                        index=number,
                        text=delta.text,
                        finish_reason=delta.finish_reason,
                        logprobs=map(_score, delta.scores),
                    )
                    if last:
                        _end(response, answers)
                    yield response

    async def Generate(
        self, request: FrontendServiceGenerateRequest, context: Any
    ) -> AsyncIterator[FrontendServiceGenerateResponse]:
        received = time.monotonic()
        with proto_names():
            body = tokens_body(
                list(request.token_ids), request.model, request.sampling, request.options, request.explain
            )
            answers = await token_answers(
                self._gateway,
                body,
                _request_id(context),
                received=received,
                timeout_s=context.time_remaining(),
                prompt_logprobs=request.sampling.prompt_logprobs,
            )
            with answers, _reader_bounded(answers):
                session = answers.sessions[0]
                await session.start()
                scored = session.attempt.prompt_logprobs
                while not session.finished:
                    output = await session.next()
                    if output.token_ids:
                        yield FrontendServiceGenerateResponse(
                            token_ids=output.token_ids, logprobs=output.logprobs, prompt_logprobs=scored
                        )
                        scored = ()
                finish = session.finish
                stopped = finish is not None and finish.reason == FINISH_REASON_STOP
                response = FrontendServiceGenerateResponse(finish_reason="stop" if stopped else "length")
                _end(response, answers)
                yield response

    async def Embed(self, request: EmbedRequest, context: Any) -> EmbedResponse:
        received = time.monotonic()
        with proto_names():
            vectors = await embed(
                self._gateway,
                embedding_body(request),
                _request_id(context),
                received=received,
                timeout_s=context.time_remaining(),
            )
        return EmbedResponse(
            embeddings=[Embedding(values=row) for row in vectors.rows],
            usage=Usage(prompt_tokens=vectors.prompt_tokens),
        )

    async def ListModels(self, request: ListModelsRequest, context: Any) -> ListModelsResponse:
        return ListModelsResponse(models=[model.info for model in self._gateway.models.usable()])


async def _deltas(answers: Answers) -> AsyncGenerator[tuple[int, Delta, bool]]:
    """What comes of the answers, and whether it is the last of all; ends what runs when it is closed."""
    with answers, _reader_bounded(answers):
        left = len(answers.sessions)
        async with aclosing(answers.deltas()) as deltas:
            async for number, delta in deltas:
                left -= bool(delta.finish_reason)
                yield number, delta, not left


@contextmanager
def _reader_bounded(answers: Answers) -> Iterator[None]:
    """Around a stream of responses, in its call's task. One whose client does not read waits for it with all
    that it holds: when its time is over, it is ended by KvmeshError(DEADLINE_EXCEEDED)."""
    task = asyncio.current_task()
    assert task is not None
    over = False

    def end() -> None:
        nonlocal over
        over = True
        task.cancel()

    left = max(0.0, answers.call.deadline - time.monotonic())
    timer = asyncio.get_running_loop().call_later(left + _LAST_WORDS_S, end)
    try:
        yield
    finally:
        timer.cancel()
        if over:
            task.uncancel()
            raise KvmeshError(ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED, "the client did not read in time")


def _end(response: Any, answers: Answers) -> None:
    response.usage.CopyFrom(usage(answers))
    if answers.call.explain:
        response.kvmesh.CopyFrom(explanation(answers.sessions[0]))


def _score(score: Score) -> TokenScore:
    top = [TopToken(token=token, logprob=logprob) for token, logprob in score.top]
    return TokenScore(token=score.token, logprob=score.logprob, top=top, start=score.start)


def _request_id(context: grpc.aio.ServicerContext) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == "x-request-id" and isinstance(value, str) and value:
            return value[:128]
    return new_request_id()
