"""The same six services in containers: up, chat, kill one, chat again, down."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fixtures.mesh import wait_for
from fixtures.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
# Building the image downloads and installs SGLang.
pytestmark = [pytest.mark.docker, pytest.mark.sglang, pytest.mark.timeout(2400)]
PROJECT = "kvmesh-test"


def engine_answers() -> bool:
    return (
        shutil.which("docker") is not None
        and not subprocess.run(["docker", "info"], capture_output=True).returncode
    )


class Compose:
    """The stack under a project name and port of its own."""

    def __init__(self) -> None:
        self.port = free_port()
        self.environment = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": PROJECT,
            "KVMESH_PORT": str(self.port),
            "KVMESH_GRPC_PORT": str(free_port()),
        }

    def run(self, *arguments: str, timeout: float = 120) -> str:
        run = subprocess.run(
            [str(ROOT / "deploy" / "docker" / "compose.sh"), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert run.returncode == 0, f"compose {arguments}:\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
        return run.stdout

    def container(self, service: str) -> str:
        name = subprocess.run(
            [
                *("docker", "ps", "-q", "--filter", f"label=com.docker.compose.project={PROJECT}"),
                *("--filter", f"label=com.docker.compose.service={service}"),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        return name.stdout.strip()

    def inspect(self, service: str, template: str) -> str:
        container = self.container(service)
        if not container:
            return ""
        run = subprocess.run(
            ["docker", "inspect", "-f", template, container], capture_output=True, text=True, check=False
        )
        return run.stdout.strip()

    def healthy(self, service: str) -> bool:
        return self.inspect(service, "{{.State.Health.Status}}") == "healthy"

    def ask(self) -> str:
        body = {
            "model": "default",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "max_tokens": 16,
            "kvmesh": {"explain": True},
        }
        answer = httpx.post(f"http://127.0.0.1:{self.port}/v1/chat/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.json()["kvmesh"]["placement"]["mode"] == "disaggregated"
        return answer.json()["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def stack() -> Iterator[Compose]:
    if not engine_answers():
        pytest.skip("no Docker engine answers here")
    compose = Compose()
    try:
        compose.run("up", timeout=2000)
        wait_for(
            lambda: compose.healthy("frontend"), 300, "the frontend's container to be healthy", interval=1
        )
        yield compose
    finally:
        compose.run("down", "--volumes")


def test_stack_answers(stack: Compose) -> None:
    assert "Paris" in stack.ask()


def test_runs_as_a_user_without_rights(stack: Compose) -> None:
    assert stack.inspect("decode", "{{.Config.User}}") == "kvmesh"


def test_killed_container_comes_back(stack: Compose) -> None:
    before = stack.inspect("decode", "{{.State.StartedAt}}")
    # Every process of the container but its init: the container ends and its restart policy acts.
    container = stack.container("decode")
    subprocess.run(
        ["docker", "exec", container, "python", "-c", "import os; os.kill(-1, 9)"],
        capture_output=True,
        check=False,
    )
    wait_for(
        lambda: (
            stack.inspect("decode", "{{.State.StartedAt}}") not in ("", before) and stack.healthy("decode")
        ),
        300,
        "the decode container to be back",
        interval=1,
    )
    wait_for(
        lambda: httpx.get(f"http://127.0.0.1:{stack.port}/ready").status_code == 200,
        30,
        "the frontend to be ready",
    )
    assert "Paris" in stack.ask()
