"""`kvmesh simulate` from outside: what it prints, what it says of bad files, and how it exits."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner, Result

from kvmesh.cli.app import NOT_RUNNING, app
from kvmesh.core import simulate


class Done(NamedTuple):
    status: int
    out: str
    err: str


Simulate = Callable[..., Done]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Simulate:
    """What the command does, without a process of its own for each."""

    def call(*words: object) -> Done:
        status = simulate([str(word) for word in words])
        printed = capfd.readouterr()
        return Done(status, str(printed.out), str(printed.err))

    return call


@pytest.fixture
def figures(run: Simulate) -> Callable[..., dict[str, Any]]:
    def call(*words: object) -> dict[str, Any]:
        done = run(*words, "--json")
        assert done.status == 0, done.err
        return json.loads(done.out)

    return call


SMALL = ("--requests", 500, "--per-second", 20, "--workers", 3)


def test_it_explains_itself(run: Simulate) -> None:
    command = [sys.executable, "-m", "kvmesh.cli", "simulate", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (process.returncode, process.stderr) == (0, "")
    assert "Usage: kvmesh simulate" in process.stdout
    assert "--trace" in process.stdout
    assert "Usage: kvmesh simulate fit" in run("fit", "--help").out


def test_a_table_and_json_and_the_same_seed(run: Simulate, figures: Callable[..., Any]) -> None:
    done = run(*SMALL, "--router", "kv,random")
    assert done.status == 0
    assert [line.split(",")[0] for line in done.out.splitlines()[2:]] == ["kv", "random"]
    first = figures(*SMALL, "--seed", 3, "--slo-ttft-ms", 60)
    assert first == figures(*SMALL, "--seed", 3, "--slo-ttft-ms", 60)
    assert first != figures(*SMALL, "--seed", 4, "--slo-ttft-ms", 60)
    (kv,) = first["routers"]["kv"]
    assert kv["requests"] == 500
    assert 0 < kv["good"] < 1
    assert 0 < kv["reuse"] < 1
    assert len(kv["utilisations"]) == 3


def test_a_storm_is_refused_where_that_is_wanted(figures: Callable[..., Any]) -> None:
    storm = ("--requests", 3000, "--per-second", 200, "--workers", 1)
    (all_served,) = figures(*storm)["routers"]["kv"]
    assert all_served["refused"] == 0
    (bounded,) = figures(*storm, "--max-held", 50, "--max-wait-ms", 3000)["routers"]["kv"]
    assert bounded["refused"] > 1000
    assert bounded["requests"] + bounded["refused"] == 3000
    assert bounded["ttft_ms"]["p99"] < 0.5 * all_served["ttft_ms"]["p99"]


def test_bad_input_is_named(run: Simulate, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    line = json.dumps({"timestamp": 0, "input_length": 100, "output_length": 5, "hash_ids": [1]})
    for text, message in [
        (line + "\n\n" + line[:-9], "line 3: EOF"),
        (line + "\n{}\n", "line 2: missing field `input_length`"),
        ("", "an empty file"),
        ('{"text": "hello"}', "line 1: prompts as text"),
        ('{"what": 1}', "line 1: no known format"),
    ]:
        file.write_text(text)
        done = run("--trace", file)
        assert done.status == 1
        assert done.err.startswith(f"error: {file}: {message}"), done.err
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.5,374,44\nyesterday,1,2\n")
    assert f"{file}: line 3: not TIMESTAMP" in run("--trace", file).err
    assert "No such file" in run("--trace", tmp_path / "nothing").err
    assert "unknown router `nearest`; known: kv" in run("--router", "nearest").err
    done = run("--wokers", 3)
    assert done.status == 2
    assert "'--workers'" in done.err


def test_a_fit_is_written_and_used(run: Simulate, tmp_path: Path) -> None:
    """One request at a time, 10 ms and 0.1 ms a token, 5 ms between tokens: what is fitted says so."""
    chance = random.Random(1)
    measured = tmp_path / "measured.jsonl"
    with measured.open("w") as file:
        for at in range(60):
            tokens = chance.randint(50, 4000)
            row = {"arrival_ms": 2000 * at, "prompt_tokens": tokens, "output_tokens": 20}
            file.write(json.dumps(row | {"ttft_ms": 10 + 0.1 * tokens, "itl_ms": [5.0] * 19}) + "\n")
    rates = tmp_path / "rates.json"
    done = run("fit", measured, "--out", rates, "--json")
    assert done.status == 0, done.err
    fitted = json.loads(done.out)
    assert fitted["held_out"]["requests"] == 15
    for what in ("ttft", "itl"):
        assert abs(fitted["held_out"][what]["error"]) < 0.05, fitted
    assert json.loads(rates.read_text()) == fitted["rates"]
    assert run(*SMALL, "--rates", rates, "--blocks", 4096).status == 0
    rates.write_text('{"timing": {}}')
    assert f"error: {rates}: missing field" in run(*SMALL, "--rates", rates).err


def test_recording_wants_a_mesh(tmp_path: Path) -> None:
    def record(out: Path) -> Result:
        environment = {"KVMESH_HOME": str(tmp_path / "home")}
        return CliRunner().invoke(app, ["simulate", "record", "--out", str(out)], env=environment)

    assert record(tmp_path / "requests.jsonl").exit_code == NOT_RUNNING
    assert "is no directory" in str(record(tmp_path / "missing" / "requests.jsonl").exception)


def test_ctrl_c_ends_it() -> None:
    """The load is far beyond what the workers can do, so that the run is long."""
    command = [sys.executable, "-m", "kvmesh.cli", "simulate"]
    command += ["--requests", "300000", "--per-second", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=50)
    assert process.returncode in (130, -signal.SIGINT)
