"""Tables of values that are read one by one."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_WIDEST = 10_000


def print_whole(table: Table) -> None:
    """At the width it needs, so that nothing is cut: a terminal breaks lines that are too long for it, and
    what is no terminal has no width."""
    console = Console(highlight=False)
    wanted = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    console.width = max(console.width, wanted)
    console.print(table, crop=False)
