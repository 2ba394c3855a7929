"""The client distribution alone, in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Downloads grpcio and protobuf.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_the_client_comes_alone(tmp_path: Path) -> None:
    def run(*command: str | Path) -> str:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT / "services" / "client")
    (wheel,) = tmp_path.glob("kvmesh_client-*.whl")
    run(python, "-m", "pip", "install", "-q", wheel)
    listed = run(python, "-m", "pip", "list", "--format=freeze").split()
    names = {line.partition("==")[0].lower().replace("_", "-") for line in listed}
    assert names <= {"kvmesh-client", "grpcio", "protobuf", "typing-extensions", "pip", "setuptools"}
    for example in ("grpc_client.py", "grpc_client_async.py"):
        assert "--address" in run(python, ROOT / "examples" / example, "--help")
    script = (
        "from kvmesh.client import Client, RequestError\n"
        "try:\n    Client('127.0.0.1:1', timeout=2).models()\n"
        "except RequestError as error:\n    print(error.status.name)\n"
    )
    assert run(python, "-c", script) == "UNAVAILABLE\n"
