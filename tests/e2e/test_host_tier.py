"""A prefix that the device evicted comes back from KVBM's host tier."""

from __future__ import annotations

import httpx
import pytest

from fixtures.mesh import Mesh, wait_for

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]


def complete(mesh: Mesh, prompt: list[int]) -> dict:
    body = {
        "model": "default",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 16,
        "kvmesh": {"explain": True},
    }
    answer = httpx.post(f"{mesh.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_evicted_prefix_is_served_from_the_host_tier(small_mesh: Mesh) -> None:
    mesh = small_mesh
    (worker,) = mesh.workers().values()
    page = worker["page_size"]
    prompt = [3_000 + (position * 37) % 9_000 for position in range(25 * page + 5)]

    first = complete(mesh, prompt)
    assert sum(first["kvmesh"]["cached_tokens"].values()) == 0
    again = complete(mesh, prompt)
    assert again["kvmesh"]["cached_tokens"]["device"] >= 24 * page

    def stored() -> bool:
        tiers = {tier["tier"]: tier for store in mesh.status()["kvbm"] for tier in store["tiers"]}
        return tiers["host"]["blocks"] >= 25

    wait_for(stored, 30, "the prefix to be offloaded")
    # Other prompts, more than the device pool holds, push the prefix out of it.
    push_out(mesh, 0)
    back = complete(mesh, prompt)
    cached = back["kvmesh"]["cached_tokens"]
    assert cached["host"] >= 24 * page
    assert cached["device"] == 0
    assert back["choices"][0]["text"] == first["choices"][0]["text"]


def push_out(mesh: Mesh, seed: int) -> None:
    """Other prompts, more than the device pool holds."""
    (worker,) = mesh.workers().values()
    for number in range(worker["blocks_total"] * worker["page_size"] // 700 + 2):
        start = 12_000 + seed + number * 997
        complete(mesh, [start + (position * 53) % 20_000 for position in range(700)])


def test_engine_goes_on_when_its_store_is_killed_and_uses_the_next_one(small_mesh: Mesh) -> None:
    mesh = small_mesh
    (worker,) = mesh.workers().values()
    page = worker["page_size"]
    prompt = [5_000 + (position * 41) % 9_000 for position in range(25 * page + 5)]

    def host() -> dict:
        tiers = [tier for store in mesh.status()["kvbm"] for tier in store["tiers"] if tier["tier"] == "host"]
        return tiers[0] if tiers else {"blocks": 0}

    first = complete(mesh, prompt)
    wait_for(lambda: host()["blocks"] >= 25, 30, "the prefix to be offloaded")
    mesh.kill("kvbm")
    push_out(mesh, 1)
    # Computed anew by the engine that has lost its store, and offered to the one that takes its place.
    again = complete(mesh, prompt)
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    wait_for(lambda: mesh.status()["kvbm"][0]["tiers"] != [], 30, "the store to be started again")
    push_out(mesh, 2)
    again = complete(mesh, prompt)
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    wait_for(lambda: host()["blocks"] >= 25, 30, "the prefix to be offloaded to the new store")
    push_out(mesh, 3)
    back = complete(mesh, prompt)
    assert back["kvmesh"]["cached_tokens"]["host"] >= 24 * page
    assert back["choices"][0]["text"] == first["choices"][0]["text"]
