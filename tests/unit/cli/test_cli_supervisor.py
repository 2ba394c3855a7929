"""The supervisor with plain commands in place of roles."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.waiting import eventually
from kvmesh.cli import logfile, process
from kvmesh.cli.backoff import Backoff
from kvmesh.cli.home import Home, MeshState, ProcessState
from kvmesh.cli.pids import ProcessId
from kvmesh.cli.probes import Probe
from kvmesh.cli.process import ProcessSpec
from kvmesh.cli.supervisor import Supervisor, first_status

IDLE = "import time; print('serving', flush=True); time.sleep(600)"
DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('deaf', flush=True); time.sleep(600)"
)


class Switch(Probe):
    """Ready while `on`."""

    def __init__(self, on: bool = True) -> None:
        self.on = on

    async def ready(self) -> bool:
        return self.on

    async def close(self) -> None:
        pass


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    return home


def python(
    name: str, code: str, *, probe: Probe | None = None, stage: int = 0, grace_s: float = 5.0
) -> ProcessSpec:
    return ProcessSpec(
        name=name,
        role=name,
        command=[sys.executable, "-u", "-c", code],
        environment=dict(os.environ),
        probe=lambda: probe or Switch(),
        address="127.0.0.1:1",
        stage=stage,
        grace_s=grace_s,
    )


@asynccontextmanager
async def supervised(home: Home, *specs: ProcessSpec) -> AsyncIterator[tuple[Supervisor, asyncio.Task]]:
    supervisor = Supervisor(home, specs, first_status("model", "http://localhost:1"))
    running = asyncio.create_task(supervisor.run())
    try:
        yield supervisor, running
    finally:
        supervisor.stop()
        supervisor.stop()
        await asyncio.wait_for(running, 10)


def pid_of(supervisor: Supervisor, name: str) -> ProcessId:
    found = next(p.process for p in supervisor.status.processes if p.name == name)
    assert found is not None
    return found


def test_backoff_doubles_to_its_limit_and_forgets_after_a_minute_of_health() -> None:
    backoff = Backoff()
    assert [backoff.delay_s(0.0) for _ in range(7)] == [0.5, 1, 2, 4, 8, 10, 10]
    assert backoff.delay_s(59.0) == 10
    assert [backoff.delay_s(60.0), backoff.delay_s(0.0)] == [0.5, 1]


async def test_a_killed_process_is_restarted_and_the_status_says_why_it_died(home: Home) -> None:
    async with supervised(home, python("a", IDLE), python("b", IDLE)) as (supervisor, _):
        await eventually(lambda: supervisor.status.state is MeshState.READY, 15, "the start")
        first, other = pid_of(supervisor, "a"), pid_of(supervisor, "b")
        os.kill(first.pid, signal.SIGKILL)
        await eventually(lambda: supervisor.status.state is MeshState.DEGRADED, 15, "the death to be noticed")
        status = supervisor.status.processes[0]
        assert (status.state, status.process, status.restarts) == (ProcessState.RESTARTING, None, 1)
        assert status.last_exit.startswith("killed by SIGKILL")
        await eventually(lambda: supervisor.status.state is MeshState.READY, 15, "the restart")
        assert pid_of(supervisor, "a") != first
        assert pid_of(supervisor, "b") == other
        assert home.read_status() == supervisor.status
        assert first.alive() is False


async def test_the_reason_is_the_last_line_of_this_run(home: Home) -> None:
    home.log("a").write_text("an older story\n")
    code = (
        "import sys, time; print('first', flush=True); time.sleep(0.3); sys.exit('kvmesh a: port 1 is taken')"
    )
    async with supervised(home, python("a", code)) as (supervisor, _):
        await eventually(lambda: supervisor.status.processes[0].restarts == 1, 15, "the exit")
        assert supervisor.status.processes[0].last_exit == "exited with status 1: kvmesh a: port 1 is taken"


async def test_a_mesh_that_cannot_start_fails_with_the_reason_and_leaves_nothing(home: Home) -> None:
    broken = python("broken", "print('loading'); raise ValueError('no such model')", probe=Switch(False))
    async with supervised(home, python("fine", IDLE), broken) as (supervisor, running):
        await eventually(lambda: pid_alive(supervisor, "fine"), 15, "the sound process")
        fine = pid_of(supervisor, "fine")
        status = await asyncio.wait_for(running, 20)
        assert status.state is MeshState.FAILED
        assert "broken does not start: exited with status 1: ValueError: no such model" in status.error
        assert "loading" in status.error
        assert str(home.log("broken")) in status.error
        assert not fine.alive()
        assert [p.state for p in status.processes] == [ProcessState.STOPPED] * 2


def pid_alive(supervisor: Supervisor, name: str) -> bool:
    found = next(p.process for p in supervisor.status.processes if p.name == name)
    return found is not None and found.alive()


async def test_a_missing_program_is_named(home: Home) -> None:
    spec = python("a", "", probe=Switch(False))
    missing = replace(spec, command=["/no/such/program"])
    async with supervised(home, missing) as (supervisor, running):
        await asyncio.wait_for(running, 20)
        assert "cannot start /no/such/program: No such file or directory" in supervisor.status.error


async def test_processes_stop_in_stages_and_one_that_is_deaf_is_killed(home: Home) -> None:
    tell = "import signal, sys, time\ndef end(*_): print(time.time(), flush=True); sys.exit()\n"
    tell += "signal.signal(signal.SIGTERM, end)\nprint('up', flush=True)\ntime.sleep(600)"
    specs = [
        python("last", tell, stage=2),
        python("deaf", DEAF, stage=1, grace_s=0.5),
        python("first", tell, stage=0),
    ]
    async with supervised(home, *specs) as (supervisor, running):
        await eventually(lambda: all(logfile.tail(home.log(s.name), 1) for s in specs), 15, "the handlers")
        supervisor.stop()
        status = await asyncio.wait_for(running, 15)
        assert status.state is MeshState.STOPPING
        first, last = (float(logfile.tail(home.log(name), 1)[0]) for name in ("first", "last"))
        assert last - first >= 0.5


async def test_a_process_waits_for_the_one_it_comes_after(home: Home) -> None:
    switch = Switch(False)
    second = replace(python("second", IDLE), after="first")
    async with supervised(home, python("first", IDLE, probe=switch), second) as (supervisor, running):
        await eventually(lambda: pid_alive(supervisor, "first"), 15, "the first")
        await asyncio.sleep(0.5)
        assert supervisor.status.processes[1].process is None
        switch.on = True
        await eventually(lambda: supervisor.status.state is MeshState.READY, 15, "the second")
        switch.on = False
        supervisor.stop()
        await asyncio.wait_for(running, 10)


async def test_a_process_that_still_waits_can_be_stopped(home: Home) -> None:
    second = replace(python("second", IDLE), after="first")
    async with supervised(home, python("first", IDLE, probe=Switch(False)), second) as (supervisor, running):
        await eventually(lambda: pid_alive(supervisor, "first"), 15, "the first")
        supervisor.stop()
        await asyncio.wait_for(running, 10)
        assert supervisor.status.processes[1].state is ProcessState.STOPPED


async def test_a_second_stop_kills_at_once(home: Home) -> None:
    async with supervised(home, python("deaf", DEAF, grace_s=60)) as (supervisor, running):
        await eventually(lambda: logfile.tail(home.log("deaf"), 1) == ["deaf"], 15, "the handler")
        supervisor.stop()
        await asyncio.sleep(0.2)
        assert not running.done()
        supervisor.stop()
        await asyncio.wait_for(running, 5)


async def test_a_process_that_stops_answering_is_shown_and_recovers(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_ASK_RUNNING_S", 0.05)
    switch = Switch()
    async with supervised(home, python("a", IDLE, probe=switch)) as (supervisor, _):
        await eventually(lambda: supervisor.status.state is MeshState.READY, 15, "the start")
        switch.on = False
        await eventually(
            lambda: supervisor.status.processes[0].state is ProcessState.UNREADY, 15, "the change"
        )
        assert supervisor.status.state is MeshState.DEGRADED
        switch.on = True
        await eventually(lambda: supervisor.status.state is MeshState.READY, 15, "the recovery")
        assert supervisor.status.processes[0].restarts == 0


async def test_what_a_dead_process_had_started_dies_with_it(home: Home) -> None:
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {DEAF!r}])\n"
        "print(child.pid, flush=True)\ntime.sleep(600)"
    )
    async with supervised(home, python("a", code)) as (supervisor, _):
        await eventually(lambda: len(logfile.tail(home.log("a"), 5)) >= 2, 15, "the grandchild")
        lines = logfile.tail(home.log("a"), 5)
        grandchild = ProcessId.of(int(next(line for line in lines if line.isdigit())))
        assert grandchild is not None
        os.kill(pid_of(supervisor, "a").pid, signal.SIGKILL)
        await eventually(lambda: not grandchild.alive(), 15, "the grandchild's end")


def test_nothing_survives_a_supervisor_that_is_killed(home: Home) -> None:
    code = f"""
import asyncio, os, sys
from kvmesh.cli.home import Home
from kvmesh.cli.probes import Always
from kvmesh.cli.process import ProcessSpec
from kvmesh.cli.supervisor import Supervisor, first_status
spec = ProcessSpec("a", "a", [sys.executable, "-c", {DEAF!r}], dict(os.environ), Always)
from pathlib import Path
asyncio.run(Supervisor(Home(Path({str(home.root)!r})), [spec], first_status("m", "u")).run())
"""
    with subprocess.Popen([sys.executable, "-c", code]) as supervisor:
        try:
            deadline = time.monotonic() + 20
            while logfile.tail(home.log("a"), 1) != ["deaf"]:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            status = home.read_status()
            assert status is not None
            child = status.processes[0].process
            assert child is not None
            assert child.alive()
        finally:
            supervisor.kill()
    deadline = time.monotonic() + 5
    while child.alive():
        assert time.monotonic() < deadline, "the child outlived its supervisor"
        time.sleep(0.02)


def test_a_large_log_is_cut_and_the_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"x" * 100 + b"\n")
        logfile.cap(path, max_bytes=1000)
        assert path.stat().st_size == 101
        logfile.cap(path, max_bytes=100)
        writer.write(b"next\n")
    assert path.read_bytes() == b"next\n"
    assert logfile.older(path).stat().st_size == 101


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("kvmesh router: port 1 is taken", "kvmesh router: port 1 is taken"),
        ('{"event": "engine failed", "error": "out of memory", "ts": 1}', "engine failed: out of memory"),
        ('{"event": "ready"}', "ready"),
        ("{not json", "{not json"),
    ],
)
def test_what_a_log_line_says(line: str, said: str) -> None:
    assert logfile.message(line) == said
