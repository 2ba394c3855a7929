"""Chat completions that are kept, by OpenAI's client, against a frontend with scripted workers."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from fixtures.frontend import ANSWER, MODEL, Split, chunks_of, endless, error_of
from kvmesh.v1.errors_pb2 import Error, ErrorCode

HELLO: Any = [{"role": "user", "content": "hello"}]


def chats(split: Split) -> Any:
    return split.front.openai.chat.completions


async def stored(split: Split, **fields: Any) -> Any:
    return await chats(split).create(model="default", messages=HELLO, store=True, **fields)


async def ids(split: Split, **query: Any) -> list[str]:
    """Of all pages, as the client walks through them."""
    return [each.id async for each in chats(split).list(**query)]


async def test_a_stored_completion_is_what_was_answered(split: Split) -> None:
    asked: Any = {
        "messages": [{"role": "system", "content": "Be brief."}, *HELLO],
        "temperature": 0.5,
        "metadata": {"a": "b"},
    }
    answer = await chats(split).create(model="default", store=True, **asked)
    kept = await chats(split).retrieve(answer.id)
    assert kept.choices == answer.choices
    assert (kept.model, kept.usage, kept.created) == (MODEL, answer.usage, answer.created)
    assert (kept.metadata, kept.temperature, kept.tools) == ({"a": "b"}, 0.5, None)
    page = await chats(split).messages.list(answer.id)
    assert [(m.role, m.content) for m in page.data] == [("system", "Be brief."), ("user", "hello")]
    second = await chats(split).messages.list(answer.id, after=page.data[0].id)
    assert [m.id for m in second.data] == [page.data[1].id]
    assert not second.has_more


async def test_a_streamed_completion_is_kept_with_all_its_choices(split: Split) -> None:
    body = {"model": MODEL, "messages": HELLO, "store": True, "stream": True, "n": 2}
    response = await split.front.http.post("/v1/chat/completions", json=body)
    (id,) = {chunk["id"] for chunk in chunks_of(response.text)}
    kept = await chats(split).retrieve(id)
    assert kept.object == "chat.completion"
    assert [(c.index, c.message.content, c.finish_reason) for c in kept.choices] == [
        (i, ANSWER, "stop") for i in range(2)
    ]


async def test_nothing_is_kept_unasked_or_broken_off(split: Split) -> None:
    response = await split.front.chat(metadata={"a": "b"})
    assert response.headers["x-kvmesh-ignored-params"] == "metadata"
    split.prefill.script = split.decode.script = endless
    split.fail_decoding(Error(code=ErrorCode.ERROR_CODE_ENGINE_FAILED), 3)
    with pytest.raises(openai.APIError):
        await stored(split)
    answer = await stored(split, stream=True)
    with pytest.raises(openai.APIError):
        _ = [chunk async for chunk in answer]
    assert await ids(split) == []
    assert error_of(await split.front.http.get(f"/v1/chat/completions/{response.json()['id']}"))["code"] == (
        "not_found"
    )


async def test_lists_are_filtered_ordered_and_walked_through(split: Split) -> None:
    made = [(await stored(split, metadata={"n": str(i % 2), "k.[x]": "é"})).id for i in range(5)]
    assert await ids(split) == made
    assert await ids(split, order="desc", limit=2) == made[::-1]
    assert await ids(split, metadata={"n": "1"}, limit=1) == [made[1], made[3]]
    assert await ids(split, metadata={"n": "1", "k.[x]": "é"}, model="default") == [made[1], made[3]]
    assert await ids(split, metadata={"n": "2"}) == await ids(split, model="other") == []
    page = await chats(split).list(after=made[1], limit=2)
    assert ([each.id for each in page.data], page.has_more) == (made[2:4], True)


async def test_metadata_is_replaced_and_completions_are_deleted(split: Split) -> None:
    first, second = [(await stored(split, metadata={"a": "b"})).id for _ in range(2)]
    changed = await chats(split).update(first, metadata={"c": "d"})
    assert changed.metadata == {"c": "d"}
    assert await chats(split).retrieve(first) == changed
    assert await ids(split, metadata={"a": "b"}) == [second]
    assert await ids(split, metadata={"c": "d"}) == [first]
    # It stays in its place.
    assert await ids(split) == [first, second]
    gone = await chats(split).delete(first)
    assert (gone.deleted, gone.id, gone.object) == (True, first, "chat.completion.deleted")
    assert await ids(split) == [second]
    for call in (chats(split).retrieve, chats(split).delete, chats(split).messages.list):
        with pytest.raises(openai.NotFoundError):
            await call(first)
    with pytest.raises(openai.NotFoundError):
        await chats(split).update(first, metadata={})


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?limit=0", "limit"),
        ("?limit=²", "limit"),
        ("?order=up", "order"),
        ("?after=none", "after"),
    ],
)
async def test_bad_queries(split: Split, path: str, param: str) -> None:
    response = await split.front.http.get(f"/v1/chat/completions{path}")
    assert error_of(response)["param"] == param
    kept = await stored(split)
    response = await split.front.http.get(f"/v1/chat/completions/{kept.id}/messages{path}")
    assert error_of(response)["param"] == param
    response = await split.front.http.post(f"/v1/chat/completions/{kept.id}", json={"metadata": {"a": 1}})
    assert error_of(response)["param"] == "metadata.a"
