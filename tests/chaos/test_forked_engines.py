"""The process from which a mesh's engines are forked: they come from it, and live without it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from fixtures.forkserver import SOCKET
from fixtures.mesh import AGGREGATED, SHALLOW, Mesh, wait_for

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(300)]


def launcher_of(mesh: Mesh, worker: str) -> psutil.Process:
    """The engine's, which is the forkserver's child and not the worker's."""
    children = psutil.Process(mesh.pid("sglang")).children()
    (launcher,) = [child for child in children if child.cmdline()[0] == f"sglang::launcher_{worker}"]
    return launcher


def test_engines_are_forked_and_outlive_their_forkserver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SOCKET)  # one of the mesh's own
    engine = {"kind": "sglang", "args": {"max_total_tokens": 2048, **SHALLOW}}
    mesh = Mesh(tmp_path / "mesh", {**AGGREGATED, "engine": engine})
    try:
        mesh.up()
        answer = mesh.chat("who are you?")
        launcher = launcher_of(mesh, "aggregated-0")
        forkserver, worker = mesh.pid("sglang"), mesh.pid("aggregated-0")

        mesh.kill("sglang")
        wait_for(lambda: mesh.pid("sglang") not in (forkserver, None), 60, "another forkserver")
        wait_for(lambda: mesh.status()["mesh"]["state"] == "ready", 60, "it to be ready")
        assert mesh.pid("aggregated-0") == worker
        assert mesh.chat("who are you?")["choices"] == answer["choices"]

        # Nobody but the kernel is left to tell the worker of the launcher's end.
        launcher.kill()
        wait_for(lambda: mesh.pid("aggregated-0") not in (worker, None), 60, "the worker to start again")
        mesh.wait_ready()
        assert launcher_of(mesh, "aggregated-0").is_running()
        assert mesh.chat("who are you?")["choices"] == answer["choices"]
        left = launcher_of(mesh, "aggregated-0")
    finally:
        mesh.down()
    wait_for(lambda: not left.is_running(), 10, "the engine to end with its mesh")
