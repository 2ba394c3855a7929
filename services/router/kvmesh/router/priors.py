"""What engines are taken to be like before anything was learned of them.

No engine measures itself at its start yet. The selector's own guess is a mid-range accelerator with a model
of some 8 B parameters; the first tens of requests of a hardware class replace it.
"""

from __future__ import annotations

from typing import NamedTuple

from kvmesh.v1.common_pb2 import WorkerInfo


class Probe(NamedTuple):
    """Measurements: (tokens, tokens before them, ms); (streams, share of the pool, ms between tokens);
    (tokens, ms)."""

    prefill: tuple[tuple[int, int, float], ...] = ()
    decode: tuple[tuple[int, float, float], ...] = ()
    transfer: tuple[tuple[int, float], ...] = ()


# The order of what a few CPU cores do with a model of some 0.1 B parameters.
_CPU = Probe(
    prefill=((64, 0, 150.0), (256, 0, 500.0), (1024, 0, 2000.0), (4096, 0, 9000.0)),
    decode=((1, 0.01, 60.0), (4, 0.05, 90.0), (8, 0.1, 120.0)),
    transfer=((64, 10.0), (1024, 30.0)),
)


def prior(info: WorkerInfo) -> Probe:
    """By engine and device; empty where the selector's own guess is as good."""
    return _CPU if info.device == "cpu" and info.engine != "mock" else Probe()
