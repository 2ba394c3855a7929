"""Shows a mesh coming up: one live line a process on a terminal, a plain line a change elsewhere."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from kvmesh.cli import logfile
from kvmesh.cli.home import MeshStatus, ProcessState, ProcessStatus

_REFRESH_S = 0.15
_STYLES = {
    ProcessState.STARTING: "yellow",
    ProcessState.READY: "green",
    ProcessState.UNREADY: "yellow",
    ProcessState.RESTARTING: "red",
    ProcessState.STOPPING: "yellow",
    ProcessState.STOPPED: "dim",
}
_MARKS = {ProcessState.READY: "✓", ProcessState.RESTARTING: "✗", ProcessState.STOPPED: "·"}
_AT_REST = (ProcessState.READY, ProcessState.STOPPED)
# Engines begin their lines with a time and a rank; the line here has its own clock.
_STAMP = re.compile(
    r"^(\[[^\]]*\]\s*|\d{4}-\d\d-\d\d[T ][\d:.,]+\s*(- )?|\w*(DEBUG|INFO|WARNING|ERROR)\w*[:\s]+)+"
)


class Display:
    """Call `update` with every new status; between updates a terminal's clocks go on by themselves."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: MeshStatus | None = None
        self._shown: dict[str, tuple[ProcessState, int]] = {}
        self._spinner = Spinner("dots", style="yellow")
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, get_renderable=self._render)
        self._closed = threading.Event()
        self._clock = threading.Thread(target=self._animate, name="display", daemon=True)

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
            self._clock.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._closed.set()
        if self._live is not None:
            self._clock.join()
            self._live.stop()

    def update(self, status: MeshStatus) -> None:
        """Take over a status; cheap, may be called at any rate."""
        self._status = status
        if self._live is not None:
            self._live.refresh()
        else:
            for process in status.processes:
                seen = (process.state, process.restarts)
                if self._shown.get(process.name) != seen:
                    self._shown[process.name] = seen
                    self._say(process)

    def begin_from(self, status: MeshStatus) -> None:
        """Take over a status that is no news: plain lines are for what changes from here."""
        self._status = status
        self._shown = {process.name: (process.state, process.restarts) for process in status.processes}

    def _animate(self) -> None:
        """Spinners and clocks move while something starts or stops; a mesh that just runs costs nothing."""
        while not self._closed.wait(_REFRESH_S):
            processes = self._status.processes if self._status else []
            if self._live is not None and any(process.state not in _AT_REST for process in processes):
                self._live.refresh()

    def _say(self, process: ProcessStatus) -> None:
        self._console.print(f"{process.name:<14} {_words(process)}", markup=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        if self._status is None:
            return Text()
        table = Table.grid(padding=(0, 2))
        table.add_column(width=1)
        table.add_column(min_width=12, no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for process in self._status.processes:
            mark = _MARKS.get(process.state)
            style = _STYLES[process.state]
            table.add_row(
                Text(mark, style=style) if mark else self._spinner, process.name, _line(process, style)
            )
        return Group(table, Text())


def _line(process: ProcessStatus, style: str) -> Text:
    text = Text()
    if process.state is ProcessState.STARTING:
        text.append(f"{_age(process):<8}", style=style)
        lines = logfile.tail(Path(process.log), 1, process.log_start) if process.process else []
        if lines:
            text.append(_STAMP.sub("", logfile.message(lines[-1]).strip()), style="dim")
    elif process.state is ProcessState.READY:
        text.append(f"{_seconds(process.ready_after_s):<8}", style="dim")
        text.append(process.address, style="dim")
    else:
        text.append(_words(process), style=style)
    if process.restarts and process.state is not ProcessState.RESTARTING:
        text.append(f"  restarted {_times(process.restarts)}, last {process.last_exit}", style="red")
    return text


def _words(process: ProcessStatus) -> str:
    """The state as a plain sentence."""
    if process.state is ProcessState.READY:
        where = f" on {process.address}" if process.address else ""
        return f"ready after {_seconds(process.ready_after_s)}{where}"
    if process.state is ProcessState.RESTARTING:
        return f"{process.last_exit}; restarting"
    if process.state is ProcessState.UNREADY:
        return "running, but not ready"
    return str(process.state)


def _age(process: ProcessStatus) -> str:
    return f"{time.time() - process.since:.0f} s"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
