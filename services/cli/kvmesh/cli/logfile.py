"""Log files of supervised processes: children append to them directly, so size is capped from outside."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

# One older file of the same size is kept beside it.
MAX_BYTES = 16 << 20
_TAIL_BYTES = 64 << 10


def cap(path: Path, max_bytes: int = MAX_BYTES) -> None:
    """Move a log that has grown past `max_bytes` to `<name>.1` and go on with an empty one.

    Writers hold the file open in append mode, so it is copied and cut, not renamed; what they write
    between the two is lost.
    """
    try:
        if path.stat().st_size <= max_bytes:
            return
    except FileNotFoundError:
        return
    shutil.copyfile(path, older(path))
    os.truncate(path, 0)


def older(path: Path) -> Path:
    return path.with_name(path.name + ".1")


def tail(path: Path, lines: int, start: int = 0) -> list[str]:
    """The last non-empty lines written at or after byte `start`."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if start > size:  # cut meanwhile
                start = 0
            file.seek(max(start, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:]


def message(line: str) -> str:
    """What a log line says: the event of a JSON line with its error, any other line as it is."""
    if line.startswith("{"):
        try:
            entry = json.loads(line)
        except ValueError:
            return line.rstrip()
        if isinstance(entry, dict) and "event" in entry:
            detail = entry.get("error") or entry.get("reason")
            return f"{entry['event']}: {detail}" if detail else str(entry["event"])
    return line.rstrip()
