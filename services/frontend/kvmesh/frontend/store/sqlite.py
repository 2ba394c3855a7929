"""Records in an SQLite file, which several processes may share."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import orjson

from kvmesh.common.config import StoreConfig
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.frontend.store.contract import Page, Record
from kvmesh.frontend.store.database import Database
from kvmesh.v1.errors_pb2 import ErrorCode

_COLUMNS = "kind, id, owner, body, parent, created"
# `kept` is always the sum of all sizes, so that no write has to add them up.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    kind TEXT NOT NULL, id TEXT NOT NULL, owner TEXT NOT NULL, parent TEXT NOT NULL,
    created REAL NOT NULL, used REAL NOT NULL, size INTEGER NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (kind, id)
);
CREATE INDEX IF NOT EXISTS records_used ON records (used);
CREATE INDEX IF NOT EXISTS records_created ON records (kind, owner, created, id);
CREATE TABLE IF NOT EXISTS labels (
    kind TEXT NOT NULL, id TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (kind, id, name)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS labels_name ON labels (kind, name, id);
CREATE TABLE IF NOT EXISTS kept (one INTEGER PRIMARY KEY CHECK (one = 1), bytes INTEGER NOT NULL);
INSERT OR IGNORE INTO kept VALUES (1, 0);
CREATE TRIGGER IF NOT EXISTS record_put AFTER INSERT ON records
    BEGIN UPDATE kept SET bytes = bytes + new.size; END;
CREATE TRIGGER IF NOT EXISTS record_gone AFTER DELETE ON records
    BEGIN UPDATE kept SET bytes = bytes - old.size; END;
CREATE TRIGGER IF NOT EXISTS labels_gone AFTER DELETE ON records
    BEGIN DELETE FROM labels WHERE kind = old.kind AND id = old.id; END;
"""
_LABELLED = f"""
UPDATE records SET used = :now WHERE kind = :kind AND owner = :owner AND id IN (
    SELECT id FROM labels WHERE kind = :kind AND name IN (SELECT value FROM json_each(:names))
) RETURNING {_COLUMNS}
"""
_CHAIN = f"""
WITH RECURSIVE chain(depth, {_COLUMNS}) AS (
    SELECT 0, {_COLUMNS} FROM records WHERE kind = :kind AND id = :id AND owner = :owner
    UNION ALL
    SELECT chain.depth + 1, {", ".join(f"records.{name.strip()}" for name in _COLUMNS.split(","))}
    FROM records JOIN chain ON records.id = chain.parent
    WHERE records.kind = :kind AND records.owner = :owner AND chain.parent != '' AND chain.depth < :most
)
SELECT {_COLUMNS} FROM chain ORDER BY depth DESC
"""


class SqliteStore:
    def __init__(self, config: StoreConfig, home: Path, clock: Callable[[], float] = time.time) -> None:
        """`clock`: Unix time."""
        self._max_bytes = config.max_bytes
        self._max_age_s = config.max_age_s
        self._clock = clock
        self._database = Database(config, home, _SCHEMA)

    async def put(self, record: Record) -> None:
        await self._put(record, only_if_there=False)

    async def replace(self, record: Record, was: bytes | None = None) -> bool:
        return await self._put(record, only_if_there=True, was=was)

    async def _put(self, record: Record, *, only_if_there: bool, was: bytes | None = None) -> bool:
        labels = [(record.kind, record.id, *label) for label in record.labels.items()]
        size = len(record.body) + sum(len(part.encode()) for label in labels for part in label[2:])
        if size > self._max_bytes:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_PAYLOAD_TOO_LARGE,
                f"an answer of {size} bytes is more than the {self._max_bytes} that are kept of all; "
                "ask with `store` false",
            )

        def run(db: sqlite3.Connection) -> bool:
            now = self._clock()
            row = (record.kind, record.id, record.owner, record.body, record.parent, record.created)
            where, place = "kind = ? AND id = ?", (record.kind, record.id)
            if only_if_there:
                where, place = f"{where} AND owner = ?", (*place, record.owner)
            if was is not None:
                where, place = f"{where} AND body = ?", (*place, was)
            # Deleted first: REPLACE does not run the trigger of what it replaces.
            gone = db.execute(f"DELETE FROM records WHERE {where}", place).rowcount
            if only_if_there and not gone:
                return False
            self._evict(db, now, size)
            db.execute(
                f"INSERT INTO records ({_COLUMNS}, used, size) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, now, size),
            )
            db.executemany("INSERT INTO labels VALUES (?, ?, ?, ?)", labels)
            return True

        return await self._database.write(run)

    async def chain(self, kind: str, owner: str, id: str, most: int) -> list[Record]:
        def run(db: sqlite3.Connection) -> list[Record]:
            where = {"kind": kind, "id": id, "owner": owner, "most": most}
            self._evict(db, self._clock(), 0)
            records = [Record(*row) for row in db.execute(_CHAIN, where)]
            now = self._clock()
            db.executemany(
                "UPDATE records SET used = ? WHERE kind = ? AND id = ?",
                [(now, kind, record.id) for record in records],
            )
            return records

        records = await self._database.write(run)
        if len(records) > most:
            raise invalid(f"{id!r} continues more than {most} others; begin anew")
        if records and records[0].parent:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_NOT_FOUND,
                f"{id!r} continues {records[0].parent!r}, which is not kept any more; send the whole input",
            )
        return records

    async def get(self, kind: str, owner: str, id: str) -> Record | None:
        def run(db: sqlite3.Connection) -> Record | None:
            now = self._clock()
            self._evict(db, now, 0)
            row = db.execute(
                f"UPDATE records SET used = ? WHERE kind = ? AND id = ? AND owner = ? RETURNING {_COLUMNS}",
                (now, kind, id, owner),
            ).fetchone()
            return Record(*row) if row else None

        return await self._database.write(run)

    async def page(
        self, kind: str, owner: str, labels: Mapping[str, str], after: str, limit: int, *, newest_first: bool
    ) -> Page:
        place = "WHERE kind = ? AND owner = ?"
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")

        def run(db: sqlite3.Connection) -> Page:
            self._evict(db, self._clock(), 0)
            where, values = place, [kind, owner]
            for label in labels.items():
                where += (
                    " AND EXISTS (SELECT 1 FROM labels WHERE labels.kind = records.kind"
                    " AND labels.id = records.id AND name = ? AND value = ?)"
                )
                values += label
            if after:
                start = db.execute(
                    f"SELECT created, id FROM records {place} AND id = ?", (kind, owner, after)
                )
                begin = start.fetchone()
                if begin is None:
                    raise KvmeshError(ErrorCode.ERROR_CODE_NOT_FOUND, f"there is no {after!r}", param="after")
                where += f" AND (created, id) {beyond} (?, ?)"
                values += begin
            found = db.execute(
                f"SELECT {_COLUMNS} FROM records {where} ORDER BY created {order}, id {order} LIMIT ?",
                (*values, limit + 1),
            ).fetchall()
            return Page([Record(*row) for row in found[:limit]], len(found) > limit)

        return await self._database.write(run)

    async def labelled(self, kind: str, owner: str, names: Sequence[str]) -> list[Record]:
        def run(db: sqlite3.Connection) -> list[Record]:
            now = self._clock()
            self._evict(db, now, 0)
            where = {"now": now, "kind": kind, "owner": owner, "names": orjson.dumps(names).decode()}
            records = [Record(*row) for row in db.execute(_LABELLED, where)]
            return sorted(records, key=lambda record: (record.created, record.id))

        return await self._database.write(run)

    async def delete(self, kind: str, owner: str, id: str) -> bool:
        def run(db: sqlite3.Connection) -> bool:
            where = (kind, id, owner)
            return (
                db.execute("DELETE FROM records WHERE kind = ? AND id = ? AND owner = ?", where).rowcount > 0
            )

        return await self._database.write(run)

    async def close(self) -> None:
        await self._database.close()

    def _evict(self, db: sqlite3.Connection, now: float, room: int) -> None:
        """Until everything is young enough and `room` bytes more may come."""
        db.execute("DELETE FROM records WHERE used < ?", (now - self._max_age_s,))
        (kept,) = db.execute("SELECT bytes FROM kept").fetchone()
        while kept + room > self._max_bytes:
            (rowid, size) = db.execute(
                "SELECT rowid, size FROM records ORDER BY used, rowid LIMIT 1"
            ).fetchone()
            db.execute("DELETE FROM records WHERE rowid = ?", (rowid,))
            kept -= size
