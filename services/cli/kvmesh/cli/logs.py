"""`kvmesh logs`: what the processes wrote, merged by process, followed as it grows."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.text import Text

from kvmesh.cli import logfile
from kvmesh.cli.home import Home
from kvmesh.common.errors import invalid

_FOLLOW_EVERY_S = 0.2
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta", "bright_green")
_LEVELS = {"warning": "yellow", "error": "red", "critical": "bold red"}
# What telemetry puts into every line and the prefix here already says, or nobody reads.
_OMITTED = {"ts", "level", "event", "role", "trace_id", "span_id", "timestamp"}


def logs(home: Home, role: str | None, console: Console, *, lines: int, follow: bool, raw: bool) -> None:
    """Print the last `lines` lines of each log; with `follow`, go on until Ctrl-C.

    `role` is a role or a process name (`decode`, `decode-0`); None means all. Raises KvmeshError if unknown.
    """
    names = _names(home, role)
    width = max(map(len, names))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}

    def show(name: str, line: str) -> None:
        prefix = Text(f"{name:<{width}} │ ", style=colours[name]) if len(names) > 1 else Text()
        console.print(prefix + (Text(line) if raw else _render(line)), soft_wrap=True, highlight=False)

    sizes = {name: _size(home.log(name)) for name in names}
    for name in names:
        for line in logfile.tail(home.log(name), lines):
            show(name, line)
    if not follow:
        return
    followers = [_Follower(name, home.log(name), sizes[name]) for name in names]
    while True:
        for follower in followers:
            for line in follower.new_lines():
                show(follower.name, line)
        time.sleep(_FOLLOW_EVERY_S)


def _names(home: Home, role: str | None) -> list[str]:
    names = sorted(path.stem for path in home.logs.glob("*.log"))
    if not names:
        raise invalid(f"there are no logs in {home.logs}: start a mesh with `kvmesh up`")
    if role is None:
        return names
    chosen = [name for name in names if role in (name, name.rpartition("-")[0])]
    if not chosen:
        raise invalid(f"there is no log of `{role}`: known are {', '.join(names)}")
    return chosen


class _Follower:
    """Whole lines appended to one file since the last look; survives its being cut."""

    def __init__(self, name: str, path: Path, offset: int) -> None:
        self.name = name
        self._path = path
        self._offset = offset
        self._rest = b""

    def new_lines(self) -> Iterator[str]:
        size = _size(self._path)
        if size < self._offset:
            self._offset, self._rest = 0, b""
        if size == self._offset:
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = self._rest + file.read(size - self._offset)
        self._offset = size
        *lines, self._rest = text.split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _render(line: str) -> Text:
    """A JSON line as time, level, event and fields; any other as it is."""
    if not line.startswith("{"):
        return Text(line)
    try:
        entry = json.loads(line)
        event = entry["event"]
    except (ValueError, KeyError, TypeError):
        return Text(line)
    text = Text(f"{_clock(entry)} ", style="dim")
    level = str(entry.get("level", "info"))
    text.append(f"{level:<7} ", style=_LEVELS.get(level, "dim"))
    text.append(str(event))
    for key, value in entry.items():
        if key not in _OMITTED and value not in (None, ""):
            text.append(f" {key}=", style="dim")
            text.append(str(value))
    return text


def _clock(entry: dict[str, object]) -> str:
    stamp = entry.get("ts") or entry.get("timestamp")
    try:
        if isinstance(stamp, str):
            moment = datetime.fromisoformat(stamp)
        elif isinstance(stamp, int | float):
            moment = datetime.fromtimestamp(stamp)
        else:
            return ""
    except ValueError:
        return str(stamp)
    return moment.astimezone().strftime("%H:%M:%S.%f")[:-3]
