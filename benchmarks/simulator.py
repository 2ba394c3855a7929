"""How far fitted simulations are from measured engines, and how long a million requests take.

Timelines of vLLM on four clusters, measured by LLMServingSim (its folder below KVMESH_TRACES), and of
SGLang on this machine's CPU, measured by `kvmesh simulate record`, are fitted by `kvmesh simulate fit`; the
errors are of requests that were held out. The time is that of synthetic conversations on 64 workers, on one
core, the making of the trace included.

    python benchmarks/simulator.py [--json] [--quick]

Goals: mean TTFT and ITL of held-out requests within 10 % of what was measured; a million requests in a
minute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from harness import ROOT, TRACES, Cell, Report, machine, mesh, say, versions

MEASURED = TRACES / "llmservingsim"
RUNS = {
    "RTX4090/Llama-3.1-8B": "sharegpt-llama-3.1-8b-300-sps10.jsonl",
    "RTXPRO6000/Llama-3.1-8B": "sharegpt-llama-3.1-8b-300-sps10.jsonl",
    "RTXPRO6000/Qwen3-32B": "sharegpt-qwen3-32b-300-sps10.jsonl",
    # The same prompts, as its own record says.
    "RTXPRO6000/Qwen3-30B-A3B-Instruct-2507": "sharegpt-qwen3-32b-300-sps10.jsonl",
}
# One engine, which shares its cores with the mesh and with who asks. It refuses nobody, however slow it is.
SERVED = {
    "engine": {"kind": "sglang", "args": {"max_total_tokens": 16384}},
    "workers": {"prefill": 0, "decode": 0, "aggregated": 1},
    "kvbm": {"enabled": False},
    "router": {"max_wait_s": 86_400},
}
LOAD = ("--per-second", "0.4", "--longest-prompt", "512", "--longest-answer", "32")
# The engine's own, on a CPU (`kvmesh.engine.sglang.arguments`).
ENGINE = ("--blocks", 1024, "--pass-tokens", 512, "--max-running", 128)
LARGEST_ERROR = 0.1
REQUESTS, WORKERS, PER_SECOND = 1_000_000, 64, 300
ROUTERS = ("kv", "kv-immediate", "round-robin")
LONGEST_S = 60.0


def build() -> Path:
    say("building the simulator")
    manifest = ROOT / "rust" / "Cargo.toml"
    command = ["cargo", "build", "--release", "--quiet", "--locked", "-p", "kvmesh-sim"]
    subprocess.run([*command, "--manifest-path", manifest], check=True)
    return ROOT / "rust" / "target" / "release" / "kvmesh-sim"


def simulate(binary: Path, *words: object) -> dict[str, Any]:
    command = [str(word) for word in (binary, *words, "--json")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure_fit(report: Report, binary: Path, name: str, workload: str) -> None:
    file = MEASURED / "bench" / "examples" / name / "vllm" / "requests.jsonl"
    add_errors(report, name, simulate(binary, "fit", file, "--workload", MEASURED / workload))


def measure_own(report: Report, binary: Path, requests: int) -> None:
    with tempfile.TemporaryDirectory() as directory, mesh(Path(directory, "mesh"), SERVED) as served:
        file = str(Path(directory, "requests.jsonl"))
        # Whatever an engine does for the first time it does slowly.
        served.command("simulate", "record", "--out", file, *LOAD, "--requests", "4", "--seed", "1")
        served.command("simulate", "record", "--out", file, *LOAD, "--requests", str(requests), timeout=1800)
        fitted = simulate(binary, "fit", file, *ENGINE)
    add_errors(report, "this CPU, SGLang/SmolLM2-135M", fitted)


def add_errors(report: Report, name: str, fitted: dict[str, Any]) -> None:
    held_out = fitted["held_out"]
    for key in ("ttft", "itl"):
        found = held_out[key]
        means = f"{found['simulated_ms']:.1f} ms for {found['measured_ms']:.1f}"
        note = f"{means}; single requests {found['single_error']:.1%}"
        title = f"{name}: {key.upper()} mean, {held_out['requests']} held out"
        error = abs(found["error"])
        report.add(Cell(title, "share", "lower", error, goal=LARGEST_ERROR, note=note))


def measure_time(report: Report, binary: Path, router: str, requests: int) -> None:
    load = ("--requests", requests, "--per-second", PER_SECOND, "--workers", WORKERS)
    start = time.monotonic()
    simulate(binary, *load, "--router", router)
    taken = (time.monotonic() - start) * REQUESTS / requests
    title = f"{router}: {REQUESTS:,} requests on {WORKERS} workers"
    note = "" if requests == REQUESTS else f"from {requests:,}"
    report.add(Cell(title, "s", "lower", taken, goal=LONGEST_S, note=note))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests: a look")
    arguments = parser.parse_args()
    os.environ.setdefault("CARGO_TERM_COLOR", "never")
    report = Report("simulator", machine(), versions())
    binary = build()
    if MEASURED.exists():
        for name, workload in RUNS.items():
            say(f"fitting {name}")
            measure_fit(report, binary, name, workload)
    else:
        say(f"no {MEASURED}: nothing is fitted; set KVMESH_TRACES")
    say("recording and fitting SGLang on this CPU")
    measure_own(report, binary, 24 if arguments.quick else 100)
    for router in ROUTERS:
        say(f"a million requests, {router}")
        measure_time(report, binary, router, REQUESTS // 10 if arguments.quick else REQUESTS)
    if arguments.json:
        print(report.to_json())
    else:
        Console().print(report.table())


if __name__ == "__main__":
    main()
