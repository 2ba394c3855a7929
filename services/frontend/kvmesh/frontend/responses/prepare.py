"""A valid body to the response, or the shorter conversation, it asks for."""

from __future__ import annotations

from typing import Any

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.gateway import Gateway
from kvmesh.frontend.protocol import ChatCompletionRequest
from kvmesh.frontend.protocol.renamed import renamed
from kvmesh.frontend.responses.compaction import LONGEST_SUMMARY, SUMMARIZE, Compaction, CompactRequest
from kvmesh.frontend.responses.generation import Generation
from kvmesh.frontend.responses.items import chat_messages, checked_items, references
from kvmesh.frontend.responses.request import NAMES, ConversationRequest, InputTokensRequest, ResponsesRequest
from kvmesh.frontend.serving.answers import Answers
from kvmesh.frontend.serving.generation import chat_answers
from kvmesh.v1.errors_pb2 import ErrorCode

# The part of the context that is kept free for a summary.
_FREE = 4


async def prepare(
    gateway: Gateway, body: ResponsesRequest, request_id: str, owner: str, *, received: float
) -> Generation:
    """Raises KvmeshError for whatever can be known before anything runs."""
    body.check()
    items = await own_items(gateway, body, owner)
    messages = chat_messages(body.instructions or "", await with_history(gateway, body, items, owner))
    chat = body.chat(messages)
    cuts = _cuts(messages) if body.truncation == "auto" else [(0, 0)]
    answers = await _longest(gateway, chat, cuts, request_id, received)
    return Generation(answers, body, items, chat.tier(), gateway.kept, owner)


async def prepare_compaction(
    gateway: Gateway, body: CompactRequest, request_id: str, owner: str, *, received: float
) -> Compaction:
    """Raises KvmeshError for whatever can be known before anything runs."""
    body.check()
    items = await with_history(gateway, body, await own_items(gateway, body, owner), owner)
    messages = [*chat_messages(body.instructions or "", items), {"role": "user", "content": SUMMARIZE}]
    context = gateway.models.resolve(body.model).info.context_length
    free = min(LONGEST_SUMMARY, context // _FREE)
    answers = await _longest(gateway, body.chat(messages), _cuts(messages), request_id, received, free)
    return Compaction(answers, items)


async def count(gateway: Gateway, body: InputTokensRequest, owner: str) -> int:
    """Tokens of the prompt, however long. Raises KvmeshError."""
    body.check()
    items = await with_history(gateway, body, await own_items(gateway, body, owner), owner)
    chat = body.chat(chat_messages(body.instructions or "", items))
    with renamed(NAMES):
        chat.check()
        model = gateway.model(chat.model)
        return len(
            await model.tokenizer.encode_chat(
                chat.conversation(), chat.template_args(), gateway.cache_scope()
            )
        )


async def own_items(gateway: Gateway, body: ConversationRequest, owner: str) -> list[dict[str, Any]]:
    """The body's input, with the items that it names in their places."""
    named = references(body.input)
    return checked_items(body.input, await gateway.kept.items(owner, named) if named else {})


async def with_history(
    gateway: Gateway, body: ConversationRequest, items: list[dict[str, Any]], owner: str
) -> list[dict[str, Any]]:
    """`items` after those of the responses before."""
    if not body.previous_response_id:
        return items
    return [*await gateway.kept.history(owner, body.previous_response_id), *items]


def _cuts(messages: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """What may be left out of a conversation that is too long, least first: from the first message that is
    not the system's up to one of the user's, which then comes first."""
    start = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), 0)
    ends = [i for i, m in enumerate(messages) if m["role"] == "user" and i > start]
    return [(start, start), *((start, end) for end in ends)]


def _without(messages: list[Any], cut: tuple[int, int]) -> list[Any]:
    return messages[: cut[0]] + messages[cut[1] :]


async def _longest(
    gateway: Gateway,
    chat: ChatCompletionRequest,
    cuts: list[tuple[int, int]],
    request_id: str,
    received: float,
    free: int = 0,
) -> Answers:
    """Those of the least cut for which the prompt fits and, where it can be, leaves `free` tokens.

    Raises what the last one does.
    """

    async def answers(number: int) -> Answers:
        shorter = chat.model_copy(update={"messages": _without(chat.messages, cuts[number])})
        with renamed(NAMES):
            made = await chat_answers(gateway, shorter, request_id, received=received)
        room = made.call.model.info.context_length - len(made.call.token_ids)
        if room < free and number < len(cuts) - 1:
            raise KvmeshError(ErrorCode.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED, "too little room for the answer")
        return made

    low, high = 0, len(cuts) - 1
    found: Answers | None = None
    at = 0
    while True:
        try:
            found = await answers(at)
            high = at
        except KvmeshError as error:
            if error.code != ErrorCode.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED or at == len(cuts) - 1:
                raise
            low = at + 1
        if low >= high and found is not None:
            return found
        at = (low + high) // 2
