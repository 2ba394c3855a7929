"""A foreign gateway uses the router alone, and the workers that it names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.mesh import Mesh, wait_for

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "route_only.py"
pytestmark = pytest.mark.timeout(240)


def test_the_example_runs_a_conversation_and_leaves_nothing(mock_mesh: Mesh) -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLE), "--router", mock_mesh.router, "--turns", "3", "--max-tokens", "8"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    turns = re.findall(
        r"turn-(\d) on prefill-0 -> decode-\d: (\d+) prompt tokens, (\d+) cached, (\d+) output tokens",
        run.stdout,
    )
    assert [int(turn) for turn, *_ in turns] == [0, 1, 2]
    (_, first, cached, _), *later = turns
    assert (first, cached) == ("200", "0")
    before = int(first)
    for _, tokens, cached, output in later:
        # What the turn before had computed, in whole blocks; its answer is on the decode worker.
        assert before - 64 < int(cached) <= before
        assert 0 < int(output) <= 8
        before = int(tokens)
    assert run.stdout.count("by kv, first token expected after") == 3
    wait_for(mock_mesh.idle, 20, "every request, block, transfer and lease to be gone")
    said = mock_mesh.command("router", "explain", "turn-2", "--router", mock_mesh.router).stdout
    assert "prefill-0" in said


def test_the_example_says_what_is_wrong(mock_mesh: Mesh) -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLE), "--router", mock_mesh.router, "--model", "none"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr == "error: no worker serves `none`\n"
