"""How a worker comes by its engine's launcher: from a process that has SGLang imported, or without it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from fixtures.forkserver import forkserver
from fixtures.waiting import eventually
from kvmesh.common.config import load_config
from kvmesh.engine.contract import Role
from kvmesh.engine.sglang import starting
from kvmesh.engine.sglang.spec import EngineSpec
from kvmesh.engine.sglang.starting import Launcher, start_launcher

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(240)]


class Started:
    """A launcher and the worker's end of its link."""

    def __init__(self, launcher: Launcher, link: socket.socket) -> None:
        self.launcher = launcher
        self.link = link

    @classmethod
    async def by(cls, forkserver: str) -> Started:
        config = load_config(overrides={"engine": {"forkserver_socket": forkserver}})
        spec = EngineSpec.of(config, Role.AGGREGATED, "", "worker-0", "", None)
        ours, theirs = socket.socketpair()
        with theirs:
            return cls(await start_launcher(theirs, spec), ours)

    def is_forked(self) -> bool:
        return psutil.Process(self.launcher.pid).ppid() != os.getpid()

    async def end(self) -> int | None:
        self.link.close()
        return await asyncio.wait_for(self.launcher.wait(), 30)


@pytest_asyncio.fixture
async def forked() -> AsyncIterator[Started]:
    started = await Started.by(forkserver())
    try:
        yield started
    finally:
        await started.end()


async def test_a_launcher_is_forked_and_ends_when_its_worker_hangs_up(forked: Started) -> None:
    assert forked.is_forked()
    await eventually(lambda: os.getsid(forked.launcher.pid) == forked.launcher.pid, 10)
    assert await forked.end() == 0
    assert not psutil.pid_exists(forked.launcher.pid)


async def test_a_fork_has_the_workers_surroundings_and_none_of_its_siblings_links(
    forked: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    second = await Started.by(forkserver())
    await eventually(lambda: psutil.Process(second.launcher.pid).cwd() == str(tmp_path), 10)
    # The first ends although the second lives on, which was forked while the first's link was open.
    assert await forked.end() == 0
    assert psutil.pid_exists(second.launcher.pid)
    assert await second.end() == 0


async def test_a_killed_fork_is_told_of(forked: Started) -> None:
    forked.launcher.kill()
    assert await asyncio.wait_for(forked.launcher.wait(), 10) == -signal.SIGKILL
    forked.launcher.kill()  # has nobody to kill


async def test_a_fork_says_why_its_engine_does_not_start(forked: Started) -> None:
    spec = EngineSpec.of(load_config(), Role.AGGREGATED, "/nowhere", "worker-0", "/nowhere", None)
    reader, writer = await asyncio.open_connection(sock=forked.link)
    writer.write(json.dumps({name: getattr(spec, name) for name in spec.__slots__}).encode() + b"\n")
    answer = json.loads(await asyncio.wait_for(reader.readline(), 60))
    assert answer["event"] == "failed"
    assert "/nowhere" in answer["reason"]
    writer.close()


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "SGLANG_NEW"])
async def test_other_settings_want_an_import_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7")
    started = await Started.by(forkserver())
    assert not started.is_forked()
    await started.end()


async def test_without_a_forkserver_a_launcher_starts_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "_LISTENS_WITHIN_S", 0.2)
    left_over = tmp_path / "left-over"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as gone:
        gone.bind(str(left_over))
    for path in (left_over, tmp_path / "none"):
        started = await Started.by(str(path))
        assert not started.is_forked()
        assert await started.end() == 0


async def test_a_forkserver_outlives_callers_that_say_nonsense() -> None:
    for packet in (b"{", b"[]", b'{"environment": 1}', b""):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
            caller.settimeout(60)
            caller.connect(forkserver())
            assert json.loads(caller.recv(4096)) == {"event": "ready"}
            if packet:
                socket.send_fds(caller, [packet], [0, 1, 2])
                assert caller.recv(4096) == b""
    started = await Started.by(forkserver())
    assert started.is_forked()
    assert await started.end() == 0
