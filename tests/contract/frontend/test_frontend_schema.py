"""Every operation that the gateway describes, sent what its description allows and what it does not."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig

from fixtures.embedding_worker import VECTORS, EmbeddingWorker
from fixtures.frontend import MODEL, Split

HELLO: Any = [{"role": "user", "content": "hello"}]

# Of each operation, the same in every run. What is wrong takes long to be made up, and is refused early.
EXAMPLES = {GenerationMode.POSITIVE: 10, GenerationMode.NEGATIVE: 4}
# Of a body's fields, beside those that it must have: many together exclude each other, and get no further.
FIELDS = 4
KNOWN = {"model": MODEL, "stream": True}
# Half of the time: of what is made up here little is a conversation.
SAID: dict[str, Any] = {"messages": HELLO, "input": "hello", "previous_response_id": None}


def send_all(url: str, mode: GenerationMode, ids: dict[str, str]) -> dict[str, set[int]]:
    """The statuses that each operation has answered. Raises for an answer that no client should get.

    `ids`: of something that is there, by the path that it is found under.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", config=SchemathesisConfig())
    results: Any = schema.get_all_operations()
    operations = [result.ok() for result in results]
    # What deletes comes last.
    operations.sort(key=lambda operation: operation.method == "delete")
    return {operation.label: send_examples(operation, url, mode, ids) for operation in operations}


def send_examples(operation: Any, url: str, mode: GenerationMode, ids: dict[str, str]) -> set[int]:
    statuses = set()
    there = [id for path, id in ids.items() if operation.path.startswith(path)]

    @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    @settings(
        max_examples=EXAMPLES[mode],
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    def send(case: Any, data: st.DataObject) -> None:
        if mode.is_positive and isinstance(case.body, dict):
            schema = operation.body[0].definition["schema"]
            needed = [name for name in schema["required"] if name in case.body]
            others = sorted(case.body.keys() - set(needed))
            left = data.draw(st.sets(st.sampled_from(others), max_size=FIELDS)) if others else ()
            case.body = {name: case.body[name] for name in (*needed, *left)}
            case.body |= {name: value for name, value in KNOWN.items() if name in case.body}
            if operation.path == "/v1/embeddings":
                case.body["model"] = VECTORS
            if data.draw(st.booleans()):
                case.body |= {name: value for name, value in SAID.items() if name in schema["properties"]}
        if there and "id" in case.path_parameters and data.draw(st.booleans()):
            case.path_parameters["id"] = there[0]
        response = case.call(base_url=url, timeout=30)
        statuses.add(response.status_code)
        assert response.status_code < 500, (case.as_curl_command(), response.text)
        if response.status_code >= 400:
            assert response.json()["error"]["message"], case.as_curl_command()

    # Some take nothing that could be wrong.
    with suppress(Unsatisfiable):
        send()
    return statuses


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", list(GenerationMode))
async def test_nothing_that_is_sent_is_the_gateways_fault(split: Split, mode: GenerationMode) -> None:
    client = split.front.openai
    embeds = EmbeddingWorker(1)
    await split.front.join(embeds)
    chat = await client.chat.completions.create(model=MODEL, messages=HELLO, store=True)
    response = await client.responses.create(model=MODEL, input=HELLO)
    ids = {"/v1/chat/completions/": chat.id, "/v1/responses/": response.id}
    seen = await asyncio.to_thread(send_all, split.front.url, mode, ids)
    if mode.is_positive:
        # Most of it gets as far as an answer.
        unanswered = {label for label, statuses in seen.items() if 200 not in statuses}
        assert unanswered == {"GET /v1/models/{name}", "POST /v1/responses/{id}/cancel"}
    await split.idle()
    await embeds.kill()
