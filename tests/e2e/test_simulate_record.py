"""A mesh whose engine keeps to a law: the law is measured from outside, fitted, and shown by its router."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.mesh import Mesh

pytestmark = pytest.mark.timeout(180)

# Slow enough that what the processes between take does not show.
LAW = {
    "prefill_base_ms": 40.0,
    "prefill_token_ms": 0.5,
    "decode_base_ms": 30.0,
    "decode_sequence_ms": 2.0,
}
LOAD = ("--requests", "24", "--per-second", "6", "--longest-prompt", "400", "--longest-answer", "16")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    config = {
        "engine": {"kind": "mock", "mock": LAW},
        "workers": {"prefill": 0, "decode": 0, "aggregated": 1},
        "kvbm": {"enabled": False},
    }
    mesh = Mesh(tmp_path_factory.mktemp("record"), config)
    try:
        yield mesh.up()
    finally:
        mesh.command("down", "--now", timeout=60)


def test_what_is_recorded_is_fitted(mesh: Mesh, tmp_path: Path) -> None:
    lines, rates = tmp_path / "requests.jsonl", tmp_path / "rates.json"
    mesh.command("simulate", "record", "--out", str(lines), *LOAD)
    recorded = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(recorded) == 24
    assert all(16 <= line["prompt_tokens"] <= 400 and 4 <= line["output_tokens"] <= 16 for line in recorded)
    assert not any(line["cached_tokens"] for line in recorded)
    arrivals = [line["arrival_ms"] for line in recorded]
    assert arrivals == sorted(arrivals)
    # A busy machine makes requests slower than their law, and none makes them faster.
    alone = sum(LAW["prefill_base_ms"] + LAW["prefill_token_ms"] * line["prompt_tokens"] for line in recorded)
    assert sum(line["ttft_ms"] for line in recorded) > 0.8 * alone
    assert sum(line["itl_ms"] for line in recorded) > 0.8 * len(recorded) * LAW["decode_base_ms"]
    fitted = json.loads(
        mesh.command("simulate", "fit", str(lines), "--out", str(rates), "--json", "--seed", "1").stdout
    )
    assert fitted["held_out"]["requests"] == 6
    for what in ("ttft", "itl"):
        assert abs(fitted["held_out"][what]["error"]) < 0.3, fitted


def test_nothing_is_written_where_the_endpoint_refuses(mesh: Mesh, tmp_path: Path) -> None:
    out = str(tmp_path / "requests.jsonl")
    refused = mesh.command("simulate", "record", "--out", out, "--model", "nobody", check=False)
    assert refused.returncode == 1
    assert "the endpoint answered 404" in refused.stderr
    assert not list(tmp_path.iterdir())
