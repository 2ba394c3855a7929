"""Every start order of the services works.

What can go wrong in an order is one service coming before another that it uses; an order and its
reverse contain every such pair, and some shuffled orders are added for interplay of three.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.mesh import Mesh

pytestmark = pytest.mark.timeout(180)

SERVICES = ["nats", "router", "kvbm", "prefill", "decode", "frontend"]
ORDERS = [
    SERVICES,
    SERVICES[::-1],
    *(random.Random(seed).sample(SERVICES, len(SERVICES)) for seed in (1, 2, 3, 4)),
]


def command(service: str, mesh: Mesh) -> list[str]:
    if service == "nats":
        store = mesh.home / "nats"
        return [
            "nats-server",
            "-a",
            "127.0.0.1",
            "-p",
            str(mesh.config["nats"]["port"]),
            "-js",
            "-sd",
            str(store),
        ]
    return [sys.executable, "-m", f"kvmesh.{service}", "--config", str(mesh.file)]


@contextlib.contextmanager
def started(service: str, mesh: Mesh) -> Iterator[None]:
    environment = {**os.environ, "KVMESH_WORKER__ID": f"{service}-0"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with (mesh.home / f"{service}.log").open("wb") as log:
        process = subprocess.Popen(command(service, mesh), env=environment, stdout=log, stderr=log)
        try:
            yield
            assert process.poll() is None, (mesh.home / f"{service}.log").read_text()[-2000:]
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_start_order(order: list[str], tmp_path: Path) -> None:
    mesh = Mesh(tmp_path, {"engine": {"kind": "mock"}, "workers": {"drain_s": 1}, "frontend": {"drain_s": 1}})
    with contextlib.ExitStack() as stack:
        for service in order:
            stack.enter_context(started(service, mesh))
            # Long enough for the service to look for the others and not find those that come later.
            time.sleep(0.7)
        mesh.wait_ready(45)
        assert mesh.chat("hello")["choices"][0]["message"]["content"]
