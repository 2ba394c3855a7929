"""A valid body to the response it asks for."""

from __future__ import annotations

from typing import Any

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.answers import Answers
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.generation import chat_answers
from kvmesh.frontend.protocol.renamed import renamed
from kvmesh.frontend.responses.generation import Generation
from kvmesh.frontend.responses.items import chat_messages, checked_items
from kvmesh.frontend.responses.request import NAMES, InputTokensRequest, ResponsesRequest
from kvmesh.v1.errors_pb2 import ErrorCode


async def prepare(
    gateway: Gateway, body: ResponsesRequest, request_id: str, owner: str, *, received: float
) -> Generation:
    """Raises KvmeshError for whatever can be known before anything runs."""
    body.check()
    items = checked_items(body.input)
    messages = await conversation(gateway, body, items, owner)
    chat = body.chat(messages)

    async def answers(dropped: int) -> Answers:
        shorter = chat.model_copy(update={"messages": _without(chat.messages, cuts[dropped])})
        with renamed(NAMES):
            return await chat_answers(gateway, shorter, request_id, received=received)

    cuts = _cuts(messages) if body.truncation == "auto" else [(0, 0)]
    return Generation(await _longest(answers, len(cuts)), body, items, chat.tier(), gateway.kept, owner)


async def count(gateway: Gateway, body: InputTokensRequest, owner: str) -> int:
    """Tokens of the prompt, however long. Raises KvmeshError."""
    body.check()
    chat = body.chat(await conversation(gateway, body, checked_items(body.input), owner))
    with renamed(NAMES):
        chat.check()
        model = gateway.model(chat.model)
        return len(await model.tokenizer.encode_chat(chat.conversation(), chat.template_args()))


async def conversation(
    gateway: Gateway, body: InputTokensRequest, items: list[dict[str, Any]], owner: str
) -> list[dict[str, Any]]:
    """The messages that the response answers, with those of the responses before it."""
    before = []
    if body.previous_response_id:
        before = await gateway.kept.history(owner, body.previous_response_id)
    return chat_messages(body.instructions or "", [*before, *items])


def _cuts(messages: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """What may be left out of a conversation that is too long, least first: from the first message that is
    not the system's up to one of the user's, which then comes first."""
    start = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), 0)
    ends = [i for i, m in enumerate(messages) if m["role"] == "user" and i > start]
    return [(start, start), *((start, end) for end in ends)]


def _without(messages: list[Any], cut: tuple[int, int]) -> list[Any]:
    return messages[: cut[0]] + messages[cut[1] :]


async def _longest(answers: Any, count: int) -> Answers:
    """Those of the least cut for which the prompt fits. Raises what the last one does."""
    low, high = 0, count - 1
    found: Answers | None = None
    at = 0
    while True:
        try:
            found = await answers(at)
            high = at
        except KvmeshError as error:
            if error.code != ErrorCode.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED or at == count - 1:
                raise
            low = at + 1
        if low >= high and found is not None:
            return found
        at = (low + high) // 2
