"""The `kvmesh` command on a whole mesh of mock engines: up, status, chat, crashes, down."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pexpect
import pytest

from fixtures.mesh import KVMESH, Mesh, wait_for
from kvmesh.cli.pids import ProcessId, supervised

pytestmark = pytest.mark.timeout(240)

CONFIG = {"engine": {"kind": "mock"}}
NAMES = ["nats", "router", "kvbm", "prefill-0", "decode-0", "frontend"]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    """Configured, not started; whatever a test leaves running is ended."""
    mesh = Mesh(tmp_path, CONFIG)
    try:
        yield mesh
    finally:
        mesh.command("down", "--now", timeout=60)
        assert supervised(tmp_path) == []


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """One mesh for tests that leave it as it was."""
    mesh = Mesh(tmp_path_factory.mktemp("cli"), CONFIG)
    try:
        yield mesh.up()
    finally:
        mesh.command("down", "--now", timeout=60)


def environment(mesh: Mesh) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("KVMESH_")}
    return kept | {"KVMESH_HOME": str(mesh.home)}


def process_ids(mesh: Mesh) -> list[ProcessId]:
    found = [ProcessId.of(process["pid"]) for process in mesh.status()["processes"]]
    assert all(found)
    return [process for process in found if process]


def test_up_answers_and_the_printed_curl_works_then_down_leaves_nothing(mesh: Mesh) -> None:
    up = mesh.command("up", "--config", str(mesh.file), "--detach")
    assert "What is the capital of France?" in up.stdout
    assert "prefill-0 → decode-0 · first token after" in up.stdout
    assert "tokens/s" in up.stdout

    curl = next(line.strip() for line in up.stdout.splitlines() if line.strip().startswith("curl"))
    answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=60, check=True)
    chunks = [line for line in answer.stdout.splitlines() if line.startswith("data: {")]
    assert len(chunks) > 4
    assert answer.stdout.rstrip().endswith("data: [DONE]")

    status = json.loads(mesh.command("status", "--json").stdout)
    assert status["mesh"]["state"] == "ready"
    assert [process["name"] for process in status["processes"]] == NAMES
    workers = {worker["id"]: worker for worker in status["workers"]}
    assert workers.keys() == {"prefill-0", "decode-0"}
    assert workers["decode-0"].items() >= {
        "role": "decode", "engine": "mock", "state": "ready", "requests": 0, "blocks_used": 0, "routed": True
    }.items()  # fmt: skip
    assert workers["decode-0"]["blocks_total"] > 0
    assert workers["decode-0"]["output_tokens_total"] > 0
    assert status["router"]["policy"] == "kv"
    assert status["router"]["index"].keys() >= {"blocks", "workers", "bytes"}
    assert status["kvbm"][0]["tiers"][0].keys() >= {"tier", "capacity_bytes", "used_bytes", "blocks"}
    assert status["nats"]["connected"] is True
    table = mesh.command("status").stdout
    assert all(name in table for name in NAMES)

    said = mesh.command("chat", "Say something", "--max-tokens", "8").stdout
    assert said.strip()
    assert "ready" in mesh.command("logs", "router").stdout

    before = process_ids(mesh)
    assert mesh.command("down").stdout.rstrip().endswith("stopped")
    assert not any(process.alive() for process in before)
    assert mesh.command("status", check=False).returncode == 3
    assert "nothing is running" in mesh.command("down").stdout


def test_a_second_up_joins_the_same_mesh_and_refuses_another(running: Mesh) -> None:
    before = process_ids(running)
    again = running.command("up", "--config", str(running.file), "--detach")
    assert "already running" in again.stdout
    assert process_ids(running) == before
    other = running.command("up", "--config", str(running.file), "--decode", "2", "--detach", check=False)
    assert other.returncode == 1
    assert "differs in `workers`" in other.stderr
    foreground = running.command("up", "--config", str(running.file), check=False)
    assert foreground.returncode == 1
    assert "already running" in foreground.stderr
    assert "kvmesh down" in foreground.stderr
    assert process_ids(running) == before


def test_a_conversation_and_a_watched_status(running: Mesh) -> None:
    def screen(*arguments: str, terminal: str = "xterm-256color") -> pexpect.spawn:
        return pexpect.spawn(
            KVMESH[0],
            [*KVMESH[1:], *arguments],
            env=environment(running) | {"TERM": terminal},
            dimensions=(40, 120),
            encoding="utf-8",
            timeout=30,
        )

    chat = screen("chat", "--max-tokens", "2000")
    chat.expect("> ")
    chat.sendline("first")
    # The answer has begun, and is long enough to be interrupted.
    chat.expect(r" \w+ \w+ \w+")
    chat.sendintr()
    chat.expect("stopped.*> ")
    chat.sendline("/new")
    chat.expect("> ")
    chat.sendline("second")
    chat.expect(r"decode-0 · first token after \d+ ms · .* tokens/s", timeout=60)
    chat.expect("> ")
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0

    for terminal in ("xterm-256color", "dumb"):
        watch = screen("status", "--watch", terminal=terminal)
        for _ in range(3):
            watch.expect("prefill-0")
        watch.sendintr()
        watch.expect(pexpect.EOF)
        watch.close()
        assert watch.exitstatus == 130


def test_the_router_says_why_and_is_changed(running: Mesh) -> None:
    answer = running.chat("why there?", kvmesh={"explain": True})["kvmesh"]
    (decision,) = json.loads(running.command("router", "explain", answer["request_id"], "--json").stdout)
    assert decision["policy"] == "kv"
    assert decision["winner"]["decode"] == answer["placement"]["decode"]
    assert decision["winner"]["prefill"] == answer["placement"]["prefill"]
    assert decision["winner"]["terms"]["prefill"] > 0
    assert decision["predicted_ttft_ms"] > 0
    (candidate,) = answer["candidates"]
    assert candidate["cost"] == pytest.approx(sum(candidate["terms"].values()))
    assert "prefill-0" in running.command("router", "explain", answer["request_id"]).stdout
    missing = running.command("router", "explain", "nobody", check=False)
    assert missing.returncode == 1
    assert "no router knows" in missing.stderr

    (router,) = json.loads(running.command("router", "rates", "--json").stdout)
    (model,) = router["models"]
    assert model["predictions"] >= 1
    assert {worker["id"] for worker in model["workers"]} == {"prefill-0", "decode-0"}
    assert model["classes"][0]["laws"]["prefill"]["observations"] >= 0
    shown = running.command("router", "rates").stdout
    assert "prefill" in shown
    for worker in model["workers"]:
        line = next(line for line in shown.splitlines() if line.startswith(worker["id"]))
        assert line.split()[2:4] == [f"x{worker['slowness']:.2f}", str(worker["observations"])]
    for link in model["links"]:
        ends = (link["prefill"], link["decode"])
        (line,) = (line.split() for line in shown.splitlines() if tuple(line.split()[:2]) == ends)
        assert line[2:4] == [f"x{link['slowness']:.2f}", str(link["observations"])]

    assert "policy random" in running.command("router", "set", "policy", "random").stdout
    try:
        assert running.chat("and now?", kvmesh={"explain": True})["kvmesh"]["policy"] == "random"
        wrong = running.command("router", "set", "policy", "rondom", check=False)
        assert "did you mean `random`" in wrong.stderr
    finally:
        running.command("router", "set", "policy", "kv")


def test_killed_processes_come_back_and_status_says_why_they_died(running: Mesh) -> None:
    pids = {name: running.kill(name) for name in ("decode-0", "kvbm", "nats")}

    def recovered() -> bool:
        status = running.status()
        alive = {process["name"]: process["pid"] for process in status["processes"]}
        return status["mesh"]["state"] == "ready" and all(alive[name] != pid for name, pid in pids.items())

    wait_for(recovered, 60, "three restarts")
    for process in running.status()["processes"]:
        assert process["restarts"] == (process["name"] in pids)
        assert ("killed by SIGKILL" in process["last_exit"]) == (process["name"] in pids)
    running.wait_ready()
    wait_for(lambda: chats(running), 30, "an answer")


def chats(mesh: Mesh) -> bool:
    body = {"model": "default", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    return httpx.post(f"{mesh.url}/v1/chat/completions", json=body, timeout=30).status_code == 200


def test_nothing_survives_the_supervisor_and_down_tidies_up(mesh: Mesh) -> None:
    mesh.up()
    before = process_ids(mesh)
    os.kill(mesh.status()["mesh"]["pid"], signal.SIGKILL)
    wait_for(lambda: not any(process.alive() for process in before), 30, "the processes to follow")
    assert mesh.command("status", check=False).returncode == 3
    mesh.down()
    mesh.up()
    assert mesh.chat("hello")["choices"]


def test_a_taken_port_is_named_before_anything_starts(mesh: Mesh) -> None:
    with socket.create_server(("127.0.0.1", mesh.config["router"]["port"])):
        up = mesh.command("up", "--config", str(mesh.file), "--detach", check=False)
    assert up.returncode == 1
    assert f"port {mesh.config['router']['port']} is taken by" in up.stderr
    assert "`router.port`" in up.stderr
    assert supervised(mesh.home) == []


def test_a_process_that_cannot_start_ends_the_mesh_with_its_reason(mesh: Mesh) -> None:
    file = mesh.home / "bad.yaml"
    file.write_text(json.dumps(mesh.config | {"router": mesh.config["router"] | {"policy": "astrology"}}))
    up = mesh.command("up", "--config", str(file), "--detach", check=False)
    assert up.returncode == 1
    assert "router does not start" in up.stderr
    assert "astrology" in up.stderr
    assert "router.log" in up.stderr
    assert supervised(mesh.home) == []


def test_down_while_it_starts(mesh: Mesh) -> None:
    command = [*KVMESH, "up", "--config", str(mesh.file), "--detach"]
    with subprocess.Popen(
        command, env=environment(mesh), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as up:
        wait_for(lambda: bool(supervised(mesh.home)), 90, "the first process")
        mesh.down()
        _, error = up.communicate(timeout=90)
        assert up.returncode == 1
        assert "stopped before it was ready" in error
    assert supervised(mesh.home) == []


def test_in_the_foreground_ctrl_c_drains_and_a_second_one_kills(mesh: Mesh) -> None:
    arguments = [*KVMESH[1:], "up", "--config", str(mesh.file)]

    def start() -> pexpect.spawn:
        screen = pexpect.spawn(
            KVMESH[0],
            arguments,
            env=environment(mesh),
            dimensions=(40, 160),
            encoding="utf-8",
            # The terminal's echo of ^C may come in the middle of a character.
            codec_errors="replace",
            timeout=120,
        )
        screen.expect("prefill-0 → decode-0 · first token after")
        screen.expect("Ctrl-C stops the mesh")
        return screen

    screen = start()
    stream = {
        "model": "default", "messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "stream": True
    }  # fmt: skip
    with httpx.stream("POST", f"{mesh.url}/v1/chat/completions", json=stream, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        screen.sendintr()
        assert "data: [DONE]" in list(lines)
    screen.expect(pexpect.EOF)
    screen.close()
    assert screen.exitstatus == 0
    assert "stopped" in (screen.before or "")

    screen = start()
    with httpx.stream(
        "POST", f"{mesh.url}/v1/chat/completions", json=stream | {"max_tokens": 8000}, timeout=60
    ) as answer:
        next(answer.iter_lines())
        screen.sendintr()
        time.sleep(0.5)
        started = time.monotonic()
        screen.sendintr()
        screen.expect(pexpect.EOF)
        assert time.monotonic() - started < 10
    screen.close()
    assert supervised(mesh.home) == []
