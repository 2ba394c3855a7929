"""`kvmesh down` in every state a mesh can be left in, and the identity of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kvmesh.cli import down
from kvmesh.cli.home import Home, ProcessStatus
from kvmesh.cli.pids import MARKER, ProcessId, end, supervised
from kvmesh.cli.supervisor import first_status
from kvmesh.common.config import Config, load_config

DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('deaf', flush=True); time.sleep(600)"
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    return home


@pytest.fixture
def config(home: Home) -> Config:
    return load_config(None, {"home": str(home.root)})


class Program:
    """A process of this test, reaped at its end."""

    def __init__(self, code: str, home: Home | None = None, *, session: bool = False) -> None:
        environment = dict(os.environ) | ({MARKER: str(home.root)} if home else {})
        self.popen = subprocess.Popen(
            [sys.executable, "-u", "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            start_new_session=session,
        )
        assert self.popen.stdout is not None
        self.said = self.popen.stdout.readline().decode().strip()
        identity = ProcessId.of(self.popen.pid)
        assert identity is not None
        self.id = identity


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    started: list[Program] = []
    yield started
    for program in started:
        program.popen.kill()
        program.popen.wait()
        assert program.popen.stdout is not None
        program.popen.stdout.close()


def run_down(config: Config, *, now: bool = True) -> str:
    output = StringIO()
    down.down(config, Console(file=output, width=200), now=now)
    return output.getvalue()


def test_nothing_runs_and_again(config: Config, home: Home) -> None:
    assert run_down(config) == f"nothing is running in {home.root}\n"
    assert run_down(config) == f"nothing is running in {home.root}\n"


def test_a_home_that_was_never_made(tmp_path: Path) -> None:
    config = load_config(None, {"home": str(tmp_path / "none")})
    assert "nothing is running" in run_down(config)
    assert not (tmp_path / "none").exists()


def test_strays_of_a_dead_supervisor_are_ended(config: Config, home: Home, programs: list[Program]) -> None:
    programs += [Program(DEAF, home), Program("import time; print(1); time.sleep(600)", home)]
    other = Program("import time; print(1); time.sleep(600)", Home(home.root / "another"))
    programs.append(other)
    assert run_down(config) == "ending 2 processes left behind\nstopped\n"
    assert [program.id.alive() for program in programs] == [False, False, True]


def test_a_stray_without_the_mark_is_found_by_its_ancestor(
    config: Config, home: Home, programs: list[Program]
) -> None:
    """Engines overwrite their environment with a title."""
    program = Program(
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {DEAF!r}], env={{}}, start_new_session=True)\n"
        "print(child.pid)\ntime.sleep(600)",
        home,
    )
    programs.append(program)
    child = ProcessId.of(int(program.said))
    assert child is not None
    assert run_down(config) == "ending 2 processes left behind\nstopped\n"
    assert not child.alive()
    assert not program.id.alive()


def test_a_recycled_pid_is_left_alone(config: Config, home: Home, programs: list[Program]) -> None:
    program = Program("import time; print(1); time.sleep(600)", session=True)
    programs.append(program)
    stale = ProcessId(pid=program.id.pid, started=program.id.started - 1)
    status = first_status("model", "url").model_copy(update={"supervisor": stale})
    status.processes = [ProcessStatus(name="router", role="router", since=0.0, process=stale, log="log")]
    home.write_status(status)
    (home.root / "lock").write_text(stale.model_dump_json())
    assert not stale.send(signal.SIGKILL)
    assert run_down(config) == f"nothing is running in {home.root}\n"
    assert program.id.alive()


def test_an_up_that_has_only_begun_is_stopped(config: Config, home: Home, programs: list[Program]) -> None:
    """It holds the lock; it has written no status."""
    code = (
        "import time\nfrom pathlib import Path\nfrom kvmesh.cli.home import Home\n"
        f"lock = Home(Path({str(home.root)!r})).lock()\nprint(lock)\ntime.sleep(600)"
    )
    programs.append(Program(code))
    assert home.owner() == programs[0].id
    assert home.lock() is None
    assert run_down(config) == "stopped\n"
    assert home.owner() is None


def test_a_supervisor_that_hangs_is_killed(
    config: Config, home: Home, programs: list[Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(down, "_MARGIN_S", 0.5)
    code = (
        "import signal, time\nfrom pathlib import Path\nfrom kvmesh.cli.home import Home\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"lock = Home(Path({str(home.root)!r})).lock()\nprint(lock)\ntime.sleep(600)"
    )
    programs.append(Program(code))
    impatient = load_config(
        None, {"home": str(home.root), "frontend": {"drain_s": 0}, "workers": {"drain_s": 0}}
    )
    started = time.monotonic()
    assert run_down(impatient, now=False) == "stopped\n"
    assert time.monotonic() - started < 5
    assert not programs[0].id.alive()


def test_end_asks_before_it_kills(programs: list[Program]) -> None:
    polite = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit())\n"
    polite += "print(1)\ntime.sleep(600)"
    programs += [Program(polite), Program(DEAF)]
    assert end([program.id for program in programs], 1.0) == [programs[1].id]
    assert programs[0].popen.wait(5) == 0
    assert programs[1].popen.wait(5) == -signal.SIGKILL


def test_the_caller_is_never_among_the_supervised(home: Home) -> None:
    code = (
        "from pathlib import Path\nfrom kvmesh.cli.pids import supervised\n"
        f"print(len(supervised(Path({str(home.root)!r}))))"
    )
    program = Program(code, home)
    program.popen.communicate(timeout=10)
    assert program.said == "0"
    assert supervised(home.root) == []


def test_the_dead_and_zombies_are_not_alive(programs: list[Program]) -> None:
    program = Program("import time; print(1); time.sleep(0.5)")
    programs.append(program)
    deadline = time.monotonic() + 5
    while program.id.alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ProcessId.of(program.id.pid) is None
    assert not program.id.send(signal.SIGTERM)
