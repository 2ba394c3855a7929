"""Two aggregated workers on SGLang: conversations go back to where their KV is, and outlive their worker."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from fixtures.mesh import AGGREGATED, SHALLOW, Mesh, running, wait_for

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

TURN = 80


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    config = {
        **AGGREGATED,
        "engine": {"kind": "sglang", "args": {"max_total_tokens": 8192, **SHALLOW}},
        "workers": {"prefill": 0, "decode": 0, "aggregated": 2},
        # What one engine has must not reach the other by way of the store.
        "kvbm": {"enabled": False},
    }
    yield from running(tmp_path_factory.mktemp("two"), config)


def body(prompt: list[int], **fields: Any) -> dict[str, Any]:
    return {
        "model": "default",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 24,
        "ignore_eos": True,
        "kvmesh": {"explain": True},
        **fields,
    }


def complete(mesh: Mesh, prompt: list[int], **fields: Any) -> dict[str, Any]:
    answer = httpx.post(f"{mesh.url}/v1/completions", json=body(prompt, **fields), timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def turns(number: int, count: int) -> list[int]:
    """The prompt of a conversation's turn: what was said before, and more."""
    return [3_000 + (number * 7_919 + position * 37) % 20_000 for position in range(TURN * count)]


def test_a_conversation_returns_to_where_its_kv_is(mesh: Mesh) -> None:
    page = next(iter(mesh.workers().values()))["page_size"]
    homes: list[str] = []
    # At once: idle engines alike, one of which only seems faster, would each be right for all.
    with ThreadPoolExecutor(6) as threads:
        first = list(threads.map(lambda number: complete(mesh, turns(number, 1))["kvmesh"], range(6)))
    for said in first:
        homes.append(said["placement"]["decode"])
        assert {candidate["decode"] for candidate in said["candidates"]} == {"aggregated-0", "aggregated-1"}
    for number, home in enumerate(homes):
        said = complete(mesh, turns(number, 2))["kvmesh"]
        assert said["placement"]["decode"] == home
        costs = {candidate["decode"]: candidate for candidate in said["candidates"]}
        other = next(worker for worker in costs if worker != home)
        assert costs[home]["cost"] < costs[other]["cost"]
        # What the router said of the prefix is what the engine then reports.
        foreseen = costs[home]["cached_tokens"]["device"]
        assert foreseen >= TURN // page * page
        assert said["cached_tokens"]["device"] == foreseen
        assert costs[other]["cached_tokens"]["device"] == 0
    assert len(set(homes)) == 2, "new conversations spread"


def test_an_answer_outlives_its_worker(mesh: Mesh) -> None:
    prompt = turns(50, 2)
    length = 300
    whole = complete(mesh, prompt, max_tokens=length)["choices"][0]["text"]
    wait_for(mesh.idle, 10, "an idle mesh to start from")
    with (
        httpx.Client(timeout=120) as client,
        client.stream(
            "POST",
            f"{mesh.url}/v1/completions",
            json=body(prompt, max_tokens=length, stream=True, stream_options={"include_usage": True}),
        ) as answer,
    ):
        assert answer.status_code == 200
        text, killed, said, used = "", "", {}, {}
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = httpx.Response(200, content=line.removeprefix("data: ")).json()
            assert "error" not in chunk, chunk
            text += "".join(choice["text"] for choice in chunk["choices"])
            said, used = chunk.get("kvmesh", said), chunk.get("usage") or used
            if not killed and len(text) > 40:
                busy = [worker for worker in mesh.workers().values() if worker["requests"]]
                killed = busy[0]["id"]
                mesh.kill(killed)
    assert killed, "the answer was over before its worker could be killed"
    assert text == whole
    assert used["completion_tokens"] == length
    assert said["placement"]["decode"] == killed
    (taken_over,) = said["placement"]["continued_on"]
    assert taken_over != killed
    wait_for(lambda: len(mesh.workers()) == 2, 120, "the killed worker to be back", interval=0.5)
    wait_for(mesh.idle, 10, "nothing to be left of the request")
