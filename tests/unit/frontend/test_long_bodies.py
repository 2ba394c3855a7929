"""Bodies of very many messages are read as any other, and others run meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.protocol import ChatCompletionRequest, parse
from kvmesh.frontend.protocol.long import A_PART, conversation, parse_long

COUNT = 5 * A_PART + 3


def body(messages: list[Any], **fields: Any) -> bytes:
    return orjson.dumps({"model": "m", "messages": messages, **fields})


def many() -> list[dict[str, Any]]:
    return [{"role": "user", "content": str(number)} for number in range(COUNT)]


async def test_they_are_read_as_whole_and_others_have_their_turns() -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    raw = body(many(), seed=7, color="red")
    whole, ignored = parse(ChatCompletionRequest, raw)
    task = asyncio.create_task(others())
    parts, also_ignored = await parse_long(ChatCompletionRequest, raw)
    after_parsing = turns
    written = await conversation(parts)
    task.cancel()
    assert (parts, also_ignored) == (whole, ignored)
    assert ignored == ["color"]
    assert written == whole.conversation()
    assert after_parsing >= COUNT // A_PART
    assert turns - after_parsing >= COUNT // A_PART


@pytest.mark.parametrize("place", [0, A_PART - 1, 3 * A_PART + 7, COUNT - 1])
@pytest.mark.parametrize(
    "wrong", ["hello", {"role": "pilot", "content": "a"}, {"role": "user", "content": [{"text": "a"}]}]
)
async def test_a_wrong_one_is_named_as_in_a_short_body(place: int, wrong: Any) -> None:
    messages: list[Any] = many()
    messages[place] = wrong
    raw = body(messages)
    with pytest.raises(KvmeshError) as whole:
        parse(ChatCompletionRequest, raw)
    with pytest.raises(KvmeshError) as parts:
        await parse_long(ChatCompletionRequest, raw)
    assert (parts.value.message, parts.value.param) == (whole.value.message, whole.value.param)
    assert f"messages[{place}]" in (parts.value.param or "")


async def test_what_a_message_lacks_is_named_by_its_place() -> None:
    messages = many()
    messages[A_PART + 1] = {"role": "tool", "content": "a"}
    request, _ = await parse_long(ChatCompletionRequest, body(messages))
    with pytest.raises(KvmeshError) as caught:
        await conversation(request)
    assert caught.value.param == f"messages[{A_PART + 1}].tool_call_id"
