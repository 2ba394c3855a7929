"""Rounds in a peer's own process: a line with a number of threads in, a line of figures (JSON) out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tier.memory import Figures

HERE = Path(__file__).resolve().parents[1]


def serve(round_of: Callable[[int], Figures]) -> None:
    """In the peer's process: rounds until the input ends."""
    # What libraries print of themselves must not end up among the figures.
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)
        print(json.dumps({}), file=results, flush=True)
        for line in sys.stdin:
            print(json.dumps(round_of(int(line))), file=results, flush=True)


class PeerStore:
    """A peer's store in its own environment, which works only when told. Use as a context manager."""

    def __init__(
        self, python: Path, module: str, *arguments: object, log: Path, needs: Mapping[str, str] | None = None
    ) -> None:
        """`module` calls `serve`. Its messages go to `log`; `needs` is added to its environment."""
        self._command = [str(python), "-m", module, *map(str, arguments)]
        self._log = log
        self._environment = os.environ | (needs or {})

    def __enter__(self) -> PeerStore:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=HERE,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._answer()
        return self

    def round(self, threads: int) -> Figures:
        """Raises RuntimeError when the peer has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{threads}\n")
        self._process.stdin.flush()
        return self._answer()

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _answer(self) -> Figures:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.kill()
            tail = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(self._command)} has ended: {tail}")
        return json.loads(line)
