"""What goes on in the background, told to every process that shares the file.

The process that generates an answer, its owner, reports all of its own at short intervals. A report is also
how an owner shows that it lives, and how it hears that one of them is not wanted any more.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from kvmesh.common.config import StoreConfig
from kvmesh.frontend.store.database import Database

# Seconds since the last report of one after which nobody can follow it any more.
_KEPT_S = 600.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    id TEXT PRIMARY KEY, status TEXT NOT NULL, told REAL NOT NULL,
    closed INTEGER NOT NULL DEFAULT 0, unwanted INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS run_events (
    id TEXT NOT NULL, number INTEGER NOT NULL, event BLOB NOT NULL, PRIMARY KEY (id, number)
) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS run_gone AFTER DELETE ON runs
    BEGIN DELETE FROM run_events WHERE id = old.id; END;
"""


class Progress(NamedTuple):
    """Of one run, since its last report."""

    id: str
    status: str
    first: int
    """number of the first of `events`, which count from 0"""
    events: Sequence[bytes]
    closed: bool
    """whether these are the last ones"""


class Seen(NamedTuple):
    status: str
    closed: bool
    silent_s: float
    """since its owner's last report"""
    events: list[bytes]


class Journal:
    """Bounded by age and, of those that are closed, by bytes; the oldest go first.

    Everything raises KvmeshError(UNAVAILABLE) where the file cannot be used.
    """

    def __init__(self, config: StoreConfig, home: Path, clock: Callable[[], float] = time.time) -> None:
        """`clock`: Unix time."""
        self._max_bytes = config.max_bytes
        self._clock = clock
        # Not the records' connection: they need not wait for a report.
        self._database = Database(config, home, _SCHEMA)

    async def open(self, id: str, status: str) -> None:
        """To be done before others can know of it."""

        def run(db: sqlite3.Connection) -> None:
            now = self._clock()
            db.execute("DELETE FROM runs WHERE told < ?", (now - _KEPT_S,))
            (kept,) = db.execute("SELECT coalesce(sum(bytes), 0) FROM runs").fetchone()
            closed = db.execute("SELECT id, bytes FROM runs WHERE closed ORDER BY told").fetchall()
            for old, size in closed:
                if kept <= self._max_bytes:
                    break
                db.execute("DELETE FROM runs WHERE id = ?", (old,))
                kept -= size
            db.execute("INSERT INTO runs (id, status, told) VALUES (?, ?, ?)", (id, status, now))

        await self._database.write(run)

    async def report(self, progress: Sequence[Progress]) -> list[str]:
        """The ids of those that are to be ended: somebody wants it, or has forgotten them."""

        def run(db: sqlite3.Connection) -> list[str]:
            unwanted: list[str] = []
            now = self._clock()
            for one in progress:
                row = db.execute(
                    "UPDATE runs SET status = ?, told = ?, closed = ?, bytes = bytes + ? WHERE id = ? "
                    "RETURNING unwanted",
                    (one.status, now, one.closed, sum(map(len, one.events)), one.id),
                ).fetchone()
                if row is not None:
                    db.executemany(
                        # A report that was broken off may have been written nevertheless.
                        "INSERT OR IGNORE INTO run_events VALUES (?, ?, ?)",
                        [(one.id, number, event) for number, event in enumerate(one.events, one.first)],
                    )
                if row != (0,) and not one.closed:
                    unwanted.append(one.id)
            return unwanted

        return await self._database.write(run)

    async def read(self, id: str, first: int = 0, most: int = 0) -> Seen | None:
        """At most so many events, from the number `first`."""

        def run(db: sqlite3.Connection) -> Seen | None:
            row = db.execute("SELECT status, closed, told FROM runs WHERE id = ?", (id,)).fetchone()
            if row is None:
                return None
            events = db.execute(
                "SELECT event FROM run_events WHERE id = ? AND number >= ? ORDER BY number LIMIT ?",
                (id, first, most),
            )
            status, closed, told = row
            return Seen(status, bool(closed), self._clock() - told, [event for (event,) in events])

        return await self._database.read(run)

    async def end(self, id: str) -> None:
        """Ask its owner to; it hears it with its next report."""
        await self._database.write(lambda db: db.execute("UPDATE runs SET unwanted = 1 WHERE id = ?", (id,)))

    async def forget(self, id: str) -> None:
        """With all its events; its owner ends it."""
        await self._database.write(lambda db: db.execute("DELETE FROM runs WHERE id = ?", (id,)))

    async def close(self) -> None:
        await self._database.close()
