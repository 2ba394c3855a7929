"""A mesh that asks for keys, with two frontends on one port, driven by the command as an operator would."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import httpx
import openai
import pytest

from fixtures.mesh import Mesh, wait_for

# Of a prompt's token that is not cached: what a hit saves is seen from outside.
TOKEN_MS = 1.0
CONFIG = {
    "engine": {"kind": "mock", "mock": {"prefill_token_ms": TOKEN_MS}},
    "workers": {"prefill": 0, "decode": 0, "aggregated": 1},
    "frontend": {"processes": 2},
    "tenants": {"keys": "required"},
}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    mesh = Mesh(tmp_path_factory.mktemp("keyed"), CONFIG)
    try:
        mesh.command("up", "--config", str(mesh.file), "--detach", "--alias", "gpt-4o=default")
        yield mesh
    finally:
        mesh.down()


def answers(mesh: Mesh, key: str) -> set[int]:
    return {models(mesh, key) for _ in range(16)}


def models(mesh: Mesh, key: str) -> int:
    """The status of one request on a connection of its own, so that either frontend may get it."""
    headers = {"authorization": f"Bearer {key}"}
    return httpx.get(f"{mesh.url}/v1/models", headers=headers, timeout=30).status_code


def test_keys_of_the_command_open_and_close_every_frontend(mesh: Mesh) -> None:
    names = [process["name"] for process in mesh.status()["processes"]]
    assert {"frontend", "frontend-1"} <= set(names)
    assert models(mesh, "wrong") == 401
    key = mesh.command("keys", "create", "--tenant", "acme").stdout.strip()
    wait_for(lambda: answers(mesh, key) == {200}, 10, "the key to open every frontend")
    assert mesh.command("chat", "--key", key, "hello").stdout
    refused = mesh.command("chat", "hello", check=False)
    assert "no API key was sent" in refused.stderr
    mesh.command("keys", "revoke", key)
    wait_for(lambda: answers(mesh, key) == {401}, 10, "the key to be closed everywhere")


def test_limits_hold_over_both_frontends_and_usage_outlives_them(mesh: Mesh) -> None:
    key = mesh.command("keys", "create", "--tenant", "rival", "--rpm", "6").stdout.strip()
    wait_for(lambda: answers(mesh, key) == {200}, 10, "the key to open every frontend")
    statuses = []
    for _ in range(16):
        client = openai.OpenAI(base_url=f"{mesh.url}/v1", api_key=key, max_retries=0)
        with client:
            try:
                client.chat.completions.create(
                    model="gpt-4o", messages=[{"role": "user", "content": "hello"}], max_tokens=2
                )
                statuses.append(200)
            except openai.RateLimitError:
                statuses.append(429)
    # A request a tenth of a minute comes back while these run.
    assert 6 <= statuses.count(200) < 16
    wait_for(lambda: f",{statuses.count(200)}," in _usage(mesh), 30, "usage to be written")
    for process in ("frontend", "frontend-1"):
        mesh.kill(process)
    mesh.wait_ready()
    assert f",{statuses.count(200)}," in _usage(mesh)


def _usage(mesh: Mesh) -> str:
    return mesh.command("usage", "--tenant", "rival", "--since", "2h", "--csv").stdout


def test_no_tenant_can_tell_by_time_what_another_has_asked(mesh: Mesh) -> None:
    keys = {
        tenant: mesh.command("keys", "create", "--tenant", tenant).stdout.strip()
        for tenant in ("owner", "stranger")
    }
    for key in keys.values():
        wait_for(lambda key=key: answers(mesh, key) == {200}, 10, "the key to open every frontend")

    def ask(tenant: str, subject: str) -> tuple[float, int, int]:
        """Seconds, tokens of the prompt, and how many of them were cached."""
        text = " ".join(f"{subject} {number}" for number in range(100))
        with openai.OpenAI(base_url=f"{mesh.url}/v1", api_key=keys[tenant], max_retries=0) as client:
            start = time.monotonic()
            usage = client.chat.completions.create(
                model="default", messages=[{"role": "user", "content": text}], max_tokens=1
            ).usage
            took = time.monotonic() - start
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return took, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens or 0

    took: dict[str, list[float]] = {"own": [], "stranger": [], "new": []}
    for number in range(5):
        _, tokens, cached = ask("owner", f"secret{number}")
        # Its template's words, which every prompt of a tenant begins with.
        assert cached < 64 < tokens
        seconds, _, cached = ask("owner", f"secret{number}")
        assert cached > tokens - 32
        took["own"].append(seconds)
        for name, subject in (("stranger", f"secret{number}"), ("new", f"public{number}")):
            seconds, tokens, cached = ask("stranger", subject)
            # What its own prompts before have in common with it, and nothing of the owner's.
            assert cached < 64
            took[name].append(seconds)
        computed = (tokens - 64) * TOKEN_MS / 1000
        assert min(took["stranger"]) > computed
        assert min(took["new"]) > computed
    own, stranger, new = (median(values) for values in took.values())
    assert own < new / 2
    assert abs(stranger - new) < (new - own) / 2
