"""The gateway under load: HTTP clients -> frontend -> router (kv) -> mock workers; Dynamo doing the same.

Prompts of 576 token ids, a tenth of them shared, 1 and 16 tokens out, streamed, at 1, 32, 128 and 512
streams; four aggregated mock workers that compute prompts in no time and tokens in steps of 2 ms. CPU is
that of frontend and router (Dynamo's router is part of its frontend). Dynamo runs as its documentation
starts it without etcd: file discovery, KV router, its SGLang mocker at speed-up 0; both in turn, the other
one stopped. On ours every default is on: KV events, learned costs, admission, metrics. Goals: CPU <= 0.35
ms (1 out) and <= 0.6 ms (16 out) a request and >= 1.3x Dynamo's requests a second at 128 streams; p99 ITL
not worse; <= 40 KiB a live stream; 10,000 idle connections held. The text of a growing conversation's last
turn, rendered and tokenized, stands beside the same tokenized whole.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import psutil

from harness import Cell, Mesh, Report, cpu_seconds, main, mesh, say
from kvmesh.common.config import load_config
from kvmesh.core import TextModel
from kvmesh.engine.model import resolve_model
from load_client import Load, drive
from peers import DYNAMO, dynamo_environment

PROMPT_TOKENS = 576
STREAMS = (1, 32, 128, 512)
OUT = (1, 16)
WORKERS = 4
IDLE = 10_000
TURNS = 16
CPU_GOAL = {1: 0.35, 16: 0.6}
# Dynamo's requests a second at 128 streams as measured before, with another client on another 2-core machine.
DYNAMO_ELSEWHERE = {1: 1_791, 16: 450}
# Of ours, under load.
ON = "KV events, learned costs, admission, leases by progress, metrics"
CONFIG = {
    "engine": {
        "kind": "mock",
        "mock": {
            "total_blocks": 65_536,
            "max_batch": 512,
            "block_bytes": 1024,
            # Prompts cost nothing; steps are apart, so that every one is a message of its own.
            "prefill_base_ms": 0.0,
            "prefill_token_ms": 0.0,
            "decode_base_ms": 2.0,
            "decode_sequence_ms": 0.0,
        },
    },
    "workers": {"prefill": 0, "decode": 0, "aggregated": WORKERS},
    "kvbm": {"enabled": False},
}


class Side:
    """One system under load: where it answers, and whose CPU and memory count."""

    def __init__(self, url: str, model: str, counted: list[int], frontend: int) -> None:
        self.url, self.model, self.counted, self.frontend = url, model, counted, frontend

    def rss(self) -> int:
        return psutil.Process(self.frontend).memory_info().rss


@contextmanager
def ours(home: Path) -> Iterator[Side]:
    with mesh(home, CONFIG) as served:
        frontend = served.pid("frontend")
        yield Side(served.url, _model_name(served), [frontend, served.pid("router")], frontend)


def _model_name(served: Mesh) -> str:
    return httpx.get(f"{served.url}/v1/models").json()["data"][0]["id"]


@contextmanager
def dynamo(home: Path) -> Iterator[Side]:
    """Dynamo's frontend and mocker in processes of their own. Raises RuntimeError when it cannot be had."""
    python = dynamo_environment()
    home.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = resolve_model(load_config()).path
    variables = {**os.environ, "DYN_FILE_KV": str(home / "kv"), "DYN_LOG": "error"}
    commands = [
        [
            *(
                "-m",
                "dynamo.mocker",
                "--model-path",
                str(model),
                "--model-name",
                "peer",
                "--engine-type",
                "sglang",
            ),
            *("--block-size", "64", "--num-workers", str(WORKERS), "--speedup-ratio", "0"),
            *("--discovery-backend", "file"),
        ],
        [
            *("-m", "dynamo.frontend", "--discovery-backend", "file", "--router-mode", "kv"),
            *("--http-port", str(port)),
        ],
    ]
    processes = []
    try:
        for number, arguments in enumerate(commands):
            log = (home / f"{number}.log").open("wb")
            processes.append(
                subprocess.Popen(
                    [str(python), *arguments],
                    env=variables,
                    cwd=home,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        url = f"http://127.0.0.1:{port}"
        _wait_for_model(url, home)
        frontend = processes[1].pid
        yield Side(url, "peer", [frontend], frontend)
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for_model(url: str, home: Path) -> None:
    body = {"model": "peer", "prompt": [1, 2, 3], "max_tokens": 1}
    for _ in range(240):
        try:
            if httpx.post(f"{url}/v1/completions", json=body, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    logs = " ".join(path.read_text(errors="replace")[-300:] for path in sorted(home.glob("*.log")))
    raise RuntimeError(f"Dynamo did not answer within two minutes: {logs}")


Key = tuple[int, int]


async def loads(side: Side, seconds: float) -> dict[Key, dict[str, float]]:
    """Figures by (streams, tokens out), and the growth of the frontend's memory by a live stream."""
    figures: dict[Key, dict[str, float]] = {}
    for out in OUT:
        for streams in STREAMS:
            load, cpu = await drive(
                side.url,
                side.model,
                streams,
                PROMPT_TOKENS,
                out,
                2.0,
                seconds,
                lambda: cpu_seconds(side.counted),
            )
            figures[streams, out] = _figures(load, cpu)
            found = ", ".join(f"{name} {value:.4g}" for name, value in figures[streams, out].items())
            say(f"{side.model}, {streams} streams, {out} out: {found}")
    return figures


def _figures(load: Load, cpu: float) -> dict[str, float]:
    if load.errors:
        say(f"{load.errors} requests failed, {load.requests} were answered")
    figures = {"rate": load.requests / load.seconds, "cpu": 1e3 * cpu / max(load.requests, 1)}
    figures |= {f"ttft {name}": value for name, value in load.ttft.items()}
    return figures | {f"itl {name}": value for name, value in load.itl.items()}


async def idle_memory(side: Side, count: int) -> float:
    """KiB of the frontend's memory for each of so many open connections that ask nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 1000), hard))
    host, port = side.url.removeprefix("http://").split(":")
    before = side.rss()
    writers = []
    try:
        for _ in range(count):
            _, writer = await asyncio.open_connection(host, int(port))
            writers.append(writer)
        await asyncio.sleep(1)
        answer = await asyncio.to_thread(httpx.get, f"{side.url}/health")
        answer.raise_for_status()
        return (side.rss() - before) / 1024 / count
    finally:
        for writer in writers:
            writer.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def live_memory(side: Side, streams: int) -> float:
    """KiB for each of so many streams that are being answered: the highest seen, over what it was before.

    Before is when a few have been answered: what is made once is there.
    """
    await drive(side.url, side.model, 8, PROMPT_TOKENS, 16, 0.5, 1.0, lambda: 0.0)
    before, highest = side.rss(), 0
    task = asyncio.create_task(
        drive(side.url, side.model, streams, PROMPT_TOKENS, 256, 2.0, 4.0, lambda: 0.0)
    )
    while not task.done():
        highest = max(highest, side.rss())
        await asyncio.sleep(0.1)
    await task
    return max(0, highest - before) / 1024 / streams


def add_conversation(report: Report, calls: int) -> None:
    """A prompt of a conversation whose earlier turns have been prompts before."""
    model = TextModel(resolve_model(load_config()).path)
    said = "They walked through the old town, asked the way twice, and found the house with 12 green doors. "
    messages: list[dict[str, str]] = []
    tokens: list[int] = []
    times: dict[str, list[float]] = {"ours": [], "whole": []}
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"Turn {turn}: " + said * 25})
        written = json.dumps(messages).encode()
        if turn == TURNS - 1:
            # What a frontend does once for each prompt, with a last turn that is new every time.
            for call in range(calls):
                messages[-1]["content"] = f"{call}: " + said * 25
                written = json.dumps(messages).encode()
                begun = time.perf_counter()
                tokens = model.encode_chat(written)
                between = time.perf_counter()
                whole = model.encode(model.render(written))
                times["ours"].append((between - begun) * 1e3)
                times["whole"].append((time.perf_counter() - between) * 1e3)
                assert tokens == whole
        model.encode_chat(written)
        messages.append({"role": "assistant", "content": f"Answer {turn}: " + said * 5})
    ours, whole = (statistics.median(times[name]) for name in ("ours", "whole"))
    peers = {"tokenized whole": whole}
    note = f"{len(tokens):,} tokens"
    report.add(Cell(f"prompt of a conversation's turn {TURNS}", "ms", "lower", ours, peers, note=note))


async def run(report: Report, quick: bool) -> None:
    add_conversation(report, 20 if quick else 200)
    rounds, seconds, idle = (1, 3.0, 1_000) if quick else (3, 10.0, IDLE)
    seen: dict[str, list[dict[Key, dict[str, float]]]] = {"ours": [], "dynamo": []}
    memory: dict[str, dict[str, float]] = {"ours": {}, "dynamo": {}}
    with tempfile.TemporaryDirectory() as directory:
        sides: dict[str, Callable[[Path], AbstractContextManager[Side]]] = {"ours": ours, "dynamo": dynamo}
        for number in range(rounds):
            for name, start in list(sides.items()):
                try:
                    home = Path(directory, f"{name}{number}")
                    if not number:
                        # Each in new processes: memory that others had before would be used again.
                        with start(home / "idle") as side:
                            memory[name]["idle"] = await idle_memory(side, idle)
                        with start(home / "live") as side:
                            memory[name]["live"] = await live_memory(side, 512)
                    with start(home / "loads") as side:
                        seen[name].append(await loads(side, seconds))
                except RuntimeError as error:
                    if name == "ours":
                        raise
                    say(f"{name} is left out: {error}")
                    del sides[name]
    for out in OUT:
        for streams in STREAMS:
            _add_cells(report, seen, streams, out)
    of_ours, of_dynamo = memory["ours"], memory["dynamo"]
    beside = f"Dynamo {DYNAMO}: {of_dynamo['live']:.3g} KiB; " if "live" in of_dynamo else ""
    note = f"{beside}512 streams at once"
    report.add(Cell("memory of a live stream", "KiB", "lower", of_ours["live"], goal=40, note=note))
    peers = {f"Dynamo {DYNAMO}": of_dynamo["idle"]} if "idle" in of_dynamo else {}
    note = f"{idle:,} held at once"
    report.add(Cell("memory of an idle connection", "KiB", "lower", of_ours["idle"], peers, note=note))


def _add_cells(
    report: Report, seen: dict[str, list[dict[Key, dict[str, float]]]], streams: int, out: int
) -> None:
    def median(side: str, figure: str) -> float | None:
        values = [found[streams, out].get(figure) for found in seen[side]]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    goals = streams == 128
    wanted = {
        "rate": ("requests a second", "1/s", "higher", 1.3 if goals else None),
        "cpu": ("CPU of frontend and router", "ms", "lower", None),
        "ttft p50": ("TTFT p50", "ms", "lower", None),
        "ttft p99": ("TTFT p99", "ms", "lower", None),
        "itl p50": ("ITL p50", "ms", "lower", None),
        "itl p99": ("ITL p99", "ms", "lower", 1.0 if goals else None),
    }
    for figure, (label, unit, better, goal) in wanted.items():
        value = median("ours", figure)
        if value is None:
            continue
        peer = median("dynamo", figure)
        peers = {} if peer is None else {f"Dynamo {DYNAMO}": peer}
        at = f"{streams} stream{'s' if streams > 1 else ''}, {out} out"
        note = f"Dynamo elsewhere: {DYNAMO_ELSEWHERE[out]:,}; on: {ON}" if goals and figure == "rate" else ""
        report.add(Cell(f"{label}, {at}", unit, better, value, peers, goal=goal, note=note))
    if goals and (cpu := median("ours", "cpu")) is not None:
        # Against an absolute figure, beside the cell with the peer.
        report.add(Cell(f"CPU against its goal, {out} out", "ms", "lower", cpu, goal=CPU_GOAL[out]))


if __name__ == "__main__":
    main(__file__, run)
