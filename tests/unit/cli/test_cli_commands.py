"""The `kvmesh` command from outside: what it prints, on which stream, and how it exits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from kvmesh.cli.app import app
from kvmesh.common.config import load_config

ROOT = Path(__file__).resolve().parents[3]


def kvmesh(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("KVMESH_")}
    return subprocess.run(
        [sys.executable, "-m", "kvmesh.cli", *arguments],
        env=kept | {"KVMESH_HOME": str(home), "COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("command", ["up", "down", "status", "logs", "chat", "config", "index", "kvbm"])
def test_every_command_explains_itself(command: str) -> None:
    runner = CliRunner()
    assert command in runner.invoke(app, ["--help"]).stdout
    own = runner.invoke(app, [command, "--help"])
    assert own.exit_code == 0
    assert "Usage:" in own.stdout


@pytest.mark.parametrize("arguments", [("status", "--json"), ("chat", "hello"), ("status",)])
def test_without_a_mesh_they_say_so_and_exit_with_3(arguments: tuple[str, ...], tmp_path: Path) -> None:
    run = kvmesh(*arguments, home=tmp_path)
    assert (run.returncode, run.stdout) == (3, "")
    assert run.stderr == f"no mesh is running in {tmp_path}: start one with `kvmesh up`\n"


def test_it_says_its_version(tmp_path: Path) -> None:
    run = kvmesh("--version", home=tmp_path)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"kvmesh {version('kvmesh-cli')}\n", "")


def test_down_without_a_mesh_is_fine(tmp_path: Path) -> None:
    run = kvmesh("down", home=tmp_path)
    assert (run.returncode, run.stdout) == (0, f"nothing is running in {tmp_path}\n")


def test_config_check_names_the_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text("router: {polcy: kv}\n")
    run = kvmesh("config", "check", str(file), home=tmp_path)
    assert run.returncode == 1
    assert "unknown key `router.polcy`; did you mean `policy`?" in run.stderr
    file.write_text("router: {policy: random}\nworkers: {decode: 2}\n")
    run = kvmesh("config", "check", str(file), home=tmp_path)
    assert run.returncode == 0
    assert "prefill-0, decode-0, decode-1" in run.stdout
    assert "policy random" in run.stdout


def test_config_check_of_the_shipped_file(tmp_path: Path) -> None:
    assert kvmesh("config", "check", str(ROOT / "deploy/kvmesh.yaml"), home=tmp_path).returncode == 0


def test_config_show_is_what_holds_and_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text("router: {policy: random, port: 9100}\n")
    run = kvmesh(
        "config", "show", "--config", str(file), home=tmp_path, KVMESH_ROUTER__PORT="9200", KVMESH_PORT="9300"
    )
    shown = yaml.safe_load(run.stdout)
    assert shown["router"]["policy"] == "random"
    assert shown["router"]["port"] == 9200
    assert shown["frontend"]["http_port"] == 9300
    assert shown["home"] == str(tmp_path)
    again = tmp_path / "again.yaml"
    again.write_text(run.stdout)
    assert load_config(again).router.port == 9200


def test_config_schema_describes_every_key_in_both_forms(tmp_path: Path) -> None:
    schema = json.loads(kvmesh("config", "schema", home=tmp_path).stdout)
    assert {"model", "router", "kvbm"} <= schema["properties"].keys()
    text = kvmesh("config", "schema", "--yaml", home=tmp_path).stdout
    assert "port: 4222  # port of the server that is started" in text
    file = tmp_path / "all.yaml"
    file.write_text(text)
    assert yaml.safe_load(text).keys() == schema["properties"].keys()
    assert load_config(file).nats.port == 4222


def test_logs_of_one_role_and_of_all(tmp_path: Path) -> None:
    assert "there are no logs" in kvmesh("logs", home=tmp_path).stderr
    (tmp_path / "logs").mkdir()
    line = {"ts": "2026-01-02T03:04:05.678Z", "level": "info", "event": "ready", "role": "decode", "port": 7}
    (tmp_path / "logs/decode-0.log").write_text(json.dumps(line) + "\n")
    (tmp_path / "logs/router.log").write_text("first\nlast\n")
    run = kvmesh("logs", "decode", home=tmp_path, TZ="UTC")
    assert run.stdout == "03:04:05.678 info    ready port=7\n"
    run = kvmesh("logs", "-n", "1", "--raw", home=tmp_path)
    assert run.stdout == f"decode-0 │ {json.dumps(line)}\nrouter   │ last\n"
    assert (
        "there is no log of `planner`: known are decode-0, router"
        in kvmesh("logs", "planner", home=tmp_path).stderr
    )


def test_logs_follow_what_is_written_and_survive_a_cut(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    path = tmp_path / "logs/router.log"
    path.write_text("old\n")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("KVMESH_")}
    with subprocess.Popen(
        [sys.executable, "-m", "kvmesh.cli", "logs", "router", "-f"],
        env=kept | {"KVMESH_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "old\n"
            with path.open("a") as log:
                log.write("new\n")
            assert process.stdout.readline() == "new\n"
            path.write_text("")
            time.sleep(0.5)  # the follower looks five times a second
            path.write_text("cut\n")
            assert process.stdout.readline() == "cut\n"
        finally:
            process.terminate()


def test_the_launcher_needs_nothing_activated(tmp_path: Path) -> None:
    run = subprocess.run(
        [ROOT / "kvmesh", "status"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "KVMESH_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode == 3, run.stderr


def test_the_launcher_says_what_to_do_before_installation(tmp_path: Path) -> None:
    copy = tmp_path / "kvmesh"
    copy.write_bytes((ROOT / "kvmesh").read_bytes())
    copy.chmod(0o755)
    run = subprocess.run([copy, "status"], capture_output=True, text=True, timeout=10, check=False)
    assert run.returncode == 1
    assert run.stderr == f"error: kvmesh is not installed here yet; run: make -C {tmp_path} install\n"
