"""An SQLite file, which several processes may share. One thread speaks to it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from kvmesh.common.config import StoreConfig
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.errors_pb2 import ErrorCode

# Seconds that a process waits for another's write.
_BUSY_S = 10.0
_RETRY_S = 0.01
_MEMORY = ":memory:"

Result = TypeVar("Result")


class Database:
    """Opened at its first use."""

    def __init__(self, config: StoreConfig, home: Path, schema: str) -> None:
        """`schema`: statements that change nothing where they have run before."""
        self._path = config.path or str(home / "answers.db")
        self._schema = schema
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._connection: sqlite3.Connection | None = None

    async def write(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """All of it or nothing. Raises KvmeshError(UNAVAILABLE) where the file cannot be used."""
        # Taken for writing at once: two readers that both want to write would wait for each other.
        return await self._run("BEGIN IMMEDIATE", work)

    async def read(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """At one moment; waits for nobody's write. Raises as `write` does."""
        return await self._run("BEGIN", work)

    async def close(self) -> None:
        def run() -> None:
            if self._connection is not None:
                self._connection.close()

        await asyncio.get_running_loop().run_in_executor(self._thread, run)
        self._thread.shutdown()

    async def _run(self, begin: str, work: Callable[[sqlite3.Connection], Result]) -> Result:
        def run() -> Result:
            try:
                db = self._open()
                db.execute(begin)
                # It commits, or rolls back what failed.
                with db:
                    return work(db)
            except (sqlite3.Error, OSError) as error:
                raise KvmeshError(
                    ErrorCode.ERROR_CODE_UNAVAILABLE,
                    f"answers cannot be kept in {self._path}: {error}; see `frontend.store.path`",
                ) from None

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            if self._path != _MEMORY:
                # Conversations are their owners' alone.
                Path(self._path).parent.mkdir(parents=True, exist_ok=True)
                Path(self._path).touch(0o600)
            db = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)
            with contextlib.ExitStack() as undone:
                undone.callback(db.close)
                _share(db)
                db.execute("PRAGMA synchronous = NORMAL")
                db.executescript(self._schema)
                undone.pop_all()
            self._connection = db
        return self._connection


def _share(db: sqlite3.Connection) -> None:
    """Readers do not wait for a writer from now on."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # Of several that open a new file at the same moment, all but one may be refused: SQLite does not
            # wait for this lock by itself.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(_RETRY_S)
