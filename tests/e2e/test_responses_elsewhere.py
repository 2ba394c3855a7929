"""A background response that one frontend generates, and the clients of another that shares its store."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from fixtures.mesh import Mesh, wait_for
from fixtures.ports import free_port

# A token every 20 ms: a response is long enough to be met half-way.
CONFIG = {
    "engine": {"kind": "mock", "mock": {"decode_base_ms": 20.0}},
    "workers": {"prefill": 0, "decode": 0, "aggregated": 1},
}
LONG = {"model": "default", "input": "hello", "background": True, "max_output_tokens": 2_000}


class Owner:
    """A frontend that nobody starts anew, beside the mesh's own."""

    def __init__(self, mesh: Mesh, directory: Path) -> None:
        config = yaml.safe_load((mesh.home / "config.yaml").read_text())
        ports = {name: free_port() for name in ("http_port", "port", "metrics_port")}
        config["frontend"] = {**config["frontend"], **ports}
        file = directory / "owner.yaml"
        file.write_text(yaml.safe_dump(config))
        self.process = subprocess.Popen([sys.executable, "-m", "kvmesh.frontend", "--config", str(file)])
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{ports['http_port']}", timeout=60)

    def ready(self) -> bool:
        assert self.process.poll() is None, "the frontend has ended"
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def begin(self, **fields: Any) -> str:
        """A response that has said something."""
        id = self.http.post("/v1/responses", json={**LONG, **fields}).json()["id"]
        wait_for(lambda: self.response(id)["status"] == "in_progress", 30, "the response to begin")
        return id

    def response(self, id: str) -> dict[str, Any]:
        return self.http.get(f"/v1/responses/{id}").json()


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    mesh = Mesh(tmp_path_factory.mktemp("elsewhere"), CONFIG)
    try:
        yield mesh.up()
    finally:
        mesh.down()


@pytest.fixture(scope="module")
def other(mesh: Mesh) -> Iterator[httpx.Client]:
    """To the mesh's frontend, which generates none of the responses."""
    with httpx.Client(base_url=mesh.url, timeout=60) as client:
        yield client


@pytest.fixture
def owner(mesh: Mesh, tmp_path: Path) -> Iterator[Owner]:
    owner = Owner(mesh, tmp_path)
    try:
        wait_for(owner.ready, 60, "the second frontend to be ready")
        yield owner
    finally:
        owner.http.close()
        owner.process.terminate()
        owner.process.wait(30)


def events(client: httpx.Client, id: str, after: int = -1) -> Iterator[dict[str, Any]]:
    query = {"stream": "true", "starting_after": str(after)}
    with client.stream("GET", f"/v1/responses/{id}", params=query) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def test_it_is_followed_while_it_goes_on_and_after(owner: Owner, other: httpx.Client) -> None:
    id = owner.begin(max_output_tokens=150)
    wait_for(lambda: other.get(f"/v1/responses/{id}").json()["status"] == "in_progress", 5, "the news of it")
    live = events(other, id)
    first = [next(live) for _ in range(8)]
    assert [event["type"] for event in first[:3]] == [
        f"response.{what}" for what in ("created", "queued", "in_progress")
    ]
    assert owner.response(id)["status"] == "in_progress", "the first events came when it had ended"
    seen = [*first, *live]
    assert seen == list(events(owner.http, id))
    assert [event["sequence_number"] for event in seen] == list(range(len(seen)))
    assert seen[-1]["response"] == other.get(f"/v1/responses/{id}").json() == owner.response(id)
    assert seen[-1]["response"]["status"] == "incomplete"
    assert len(seen) > 100
    # Whoever comes back goes on behind what it has, at either of them.
    for client in (other, owner.http):
        assert list(events(client, id, 40)) == seen[41:]


def test_it_is_cancelled_and_deleted_from_elsewhere(owner: Owner, other: httpx.Client, mesh: Mesh) -> None:
    id = owner.begin()
    start = time.monotonic()
    cancelled = other.post(f"/v1/responses/{id}/cancel").json()
    took = time.monotonic() - start
    assert cancelled["status"] == "cancelled"
    assert cancelled["output"][0]["content"][0]["text"]
    assert took < 3
    assert owner.response(id) == cancelled
    assert other.post(f"/v1/responses/{id}/cancel").json() == cancelled
    wait_for(mesh.idle, 20, "the engine to have let go of it")

    gone = owner.begin()
    live = events(other, gone)
    assert next(live)["type"] == "response.created"
    assert other.delete(f"/v1/responses/{gone}").json()["deleted"]
    # Nothing of it is left, and who followed it is told no more.
    assert list(live)[-1]["type"] == "response.output_text.delta"
    wait_for(mesh.idle, 20, "the engine to have let go of it")
    for client in (owner.http, other):
        assert client.get(f"/v1/responses/{gone}").status_code == 404
        assert client.get(f"/v1/responses/{gone}?stream=true").status_code == 404


def test_one_whose_frontend_dies_has_failed(owner: Owner, other: httpx.Client) -> None:
    id, follow = owner.begin(), owner.begin()
    live = events(other, follow)
    assert next(live)["type"] == "response.created"
    owner.process.kill()
    last = list(live)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert other.get(f"/v1/responses/{id}").json()["status"] == "failed"
    assert other.post(f"/v1/responses/{id}/cancel").json()["status"] == "failed"
    assert list(events(other, follow))[-1] == last


def test_a_frontend_that_is_asked_to_stop_says_so(owner: Owner, other: httpx.Client) -> None:
    id = owner.begin(max_output_tokens=100)
    owner.process.terminate()
    assert owner.process.wait(60) == 0
    ended = other.get(f"/v1/responses/{id}").json()
    assert ended["status"] == "incomplete"
    assert list(events(other, id))[-1]["response"] == ended
