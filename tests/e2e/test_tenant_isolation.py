"""One tenant's cached blocks are no other's, in the device and below, and no placement knows better."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from statistics import median
from typing import Any

import httpx
import pytest

from fixtures.mesh import Mesh, wait_for


def complete(mesh: Mesh, prompt: list[int], tenant: str) -> dict[str, Any]:
    body = {
        "model": "default",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 8,
        "kvmesh": {"explain": True, "tenant": tenant},
    }
    answer = httpx.post(f"{mesh.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def cached(answer: dict[str, Any], tier: str = "") -> int:
    tokens = answer["kvmesh"]["cached_tokens"]
    return tokens[tier] if tier else sum(tokens.values())


def expected(answer: dict[str, Any], tier: str = "") -> int:
    """What the router knew of the prompt, on its best candidate."""

    def of(candidate: dict[str, Any]) -> int:
        return candidate["cached_tokens"][tier] if tier else sum(candidate["cached_tokens"].values())

    return max(of(candidate) for candidate in answer["kvmesh"]["candidates"])


def test_mock_engines_share_within_a_tenant_only(mock_mesh: Mesh) -> None:
    prompt = [3_000 + (position * 37) % 9_000 for position in range(405)]
    assert cached(complete(mock_mesh, prompt, "acme")) == 0
    wait_for(lambda: cached(complete(mock_mesh, prompt, "acme")) >= 384, 20, "the tenant's own hit")
    wait_for(lambda: expected(complete(mock_mesh, prompt, "acme")) >= 384, 20, "the index to know it")
    for stranger in ("rival", ""):
        answer = complete(mock_mesh, prompt, stranger)
        assert cached(answer) == 0
        assert expected(answer) == 0


@pytest.mark.sglang
@pytest.mark.timeout(600)
def test_sglang_and_the_store_share_within_a_tenant_only(small_mesh: Mesh) -> None:
    mesh = small_mesh
    (worker,) = mesh.workers().values()
    page = worker["page_size"]
    prompt = [7_000 + (position * 43) % 9_000 for position in range(25 * page + 5)]

    def host_blocks() -> int:
        tiers = {tier["tier"]: tier for store in mesh.status()["kvbm"] for tier in store["tiers"]}
        return tiers["host"]["blocks"]

    # Tests before this one have filled the store; full, it would rather keep what it has.
    mesh.command("kvbm", "flush")
    before = host_blocks()
    first = complete(mesh, prompt, "acme")
    assert cached(first) == 0
    assert cached(complete(mesh, prompt, "acme"), "device") >= 24 * page
    wait_for(lambda: host_blocks() >= before + 25, 60, "the prefix to be offloaded")
    stranger = complete(mesh, prompt, "rival")
    assert cached(stranger) == 0
    assert expected(stranger) == 0
    assert stranger["choices"][0]["text"] == first["choices"][0]["text"]

    for number in range(worker["blocks_total"] * page // 700 + 2):
        complete(mesh, [14_000 + number * 997 + (position * 53) % 20_000 for position in range(700)], "noise")
    # What the router expects of the host tier is what the engine then finds there: one chain in both.
    back = complete(mesh, prompt, "acme")
    assert cached(back, "host") >= 24 * page
    assert expected(back, "host") >= 24 * page
    assert back["choices"][0]["text"] == first["choices"][0]["text"]
    nobody = complete(mesh, prompt, "")
    assert cached(nobody) == 0
    assert expected(nobody) == 0
    assert mesh.command("index", "verify", check=False).returncode == 0


@pytest.mark.sglang
@pytest.mark.timeout(600)
def test_a_prompt_that_another_tenant_has_sent_is_as_much_work_as_a_new_one(
    small_mesh: Mesh, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """What engines compute is compared; how long it took is reported (`--junitxml`)."""
    (worker,) = small_mesh.workers().values()
    random, page = Random(7), worker["page_size"]
    ttft: dict[str, list[float]] = {"own": [], "stranger": [], "new": []}
    for _ in range(5):
        prompt, other = ([random.randrange(3_000, 40_000) for _ in range(20 * page + 5)] for _ in range(2))
        complete(small_mesh, prompt, "acme")
        answers = {
            "own": complete(small_mesh, prompt, "acme"),
            "stranger": complete(small_mesh, prompt, "rival"),
            "new": complete(small_mesh, other, "rival"),
        }
        computed = {name: len(prompt) - cached(answer) for name, answer in answers.items()}
        assert computed["own"] <= page + 5
        assert computed["stranger"] == computed["new"] == len(prompt)
        for name, answer in answers.items():
            ttft[name].append(answer["kvmesh"]["timing_ms"]["ttft"])
    faster = [stranger < new for stranger in ttft["stranger"] for new in ttft["new"]]
    report = {name: round(median(values), 1) for name, values in ttft.items()}
    report["stranger faster than new"] = round(sum(faster) / len(faster), 2)
    record_testsuite_property("ttft_ms", report)
