"""What one process reports of its runs, seen by another."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvmesh.common.config import StoreConfig
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.store.journal import Journal, Progress, Seen
from kvmesh.v1.errors_pb2 import ErrorCode


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def pair(tmp_path: Path, clock: Clock) -> AsyncIterator[tuple[Journal, Journal]]:
    config = StoreConfig(path=str(tmp_path / "db"), max_bytes=100)
    owner, other = (Journal(config, tmp_path, clock) for _ in range(2))
    yield owner, other
    await owner.close()
    await other.close()


def progress(id: str, first: int, *events: bytes, closed: bool = False) -> Progress:
    return Progress(id, "done" if closed else "live", first, events, closed)


async def test_events_are_read_from_any_number_on(pair: tuple[Journal, Journal], clock: Clock) -> None:
    owner, other = pair
    assert await other.read("a") is None
    await owner.open("a", "begun")
    assert await other.read("a", 0, 9) == Seen("begun", False, 0.0, [])
    assert await owner.report([progress("a", 0, b"0", b"1")]) == []
    # The same once more, as after a report of which nobody knows whether it was written.
    assert await owner.report([progress("a", 0, b"0", b"1", b"2")]) == []
    clock.now += 3
    assert await other.read("a", 1, 9) == Seen("live", False, 3.0, [b"1", b"2"])
    assert await other.read("a", 0, 2) == Seen("live", False, 3.0, [b"0", b"1"])
    await owner.report([progress("a", 3, b"3", closed=True)])
    assert await other.read("a", 3, 9) == Seen("done", True, 0.0, [b"3"])


async def test_an_owner_hears_what_is_not_wanted(pair: tuple[Journal, Journal]) -> None:
    owner, other = pair
    for id in "abc":
        await owner.open(id, "begun")
    await other.end("a")
    await other.forget("b")
    everything = [progress(id, 0, b".") for id in "abc"]
    assert await owner.report(everything) == ["a", "b"]
    # What is forgotten does not come back.
    assert await other.read("b", 0, 9) is None
    assert await owner.report([progress(id, 1, b".", closed=True) for id in "abc"]) == []


async def test_it_is_bounded(pair: tuple[Journal, Journal], clock: Clock) -> None:
    owner, other = pair
    for id in "abc":
        await owner.open(id, "begun")
        await owner.report([progress(id, 0, b"." * 40, closed=id != "a")])
        clock.now += 1
    await owner.open("d", "begun")
    # The oldest that has ended goes; one that has not stays.
    assert [id for id in "abcd" if await other.read(id)] == ["a", "c", "d"]
    clock.now += 599
    await owner.report([progress("d", 0, b".")])
    clock.now += 2
    await owner.open("e", "begun")
    assert [id for id in "acde" if await other.read(id)] == ["d", "e"]


async def test_processes_report_at_the_same_time(pair: tuple[Journal, Journal]) -> None:
    async def run(journal: Journal, id: str) -> None:
        await journal.open(id, "begun")
        for number in range(20):
            await journal.report([progress(id, number, b".")])

    await asyncio.gather(*(run(journal, id) for journal, id in zip(pair, "ab", strict=True)))
    for id in "ab":
        seen = await pair[0].read(id, 0, 99)
        assert seen is not None
        assert len(seen.events) == 20


async def test_another_process_makes_the_same_new_file(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "db"
    # What SQLite refuses at once, whatever its timeout: a switch to WAL while another writes.
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("CREATE TABLE theirs (id)")
        other.execute("BEGIN IMMEDIATE")
        journal = Journal(StoreConfig(path=str(path)), tmp_path, clock)
        opening = asyncio.create_task(journal.open("a", "begun"))
        await asyncio.sleep(0.2)
        assert not opening.done()
        other.execute("COMMIT")
    await opening
    assert await journal.read("a") == Seen("begun", False, 0.0, [])
    await journal.close()


async def test_a_medium_that_fails(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "db").write_bytes(b"not a database" * 100)
    journal = Journal(StoreConfig(path=str(tmp_path / "db")), tmp_path, clock)
    with pytest.raises(KvmeshError, match=r"frontend\.store\.path") as caught:
        await journal.open("a", "begun")
    assert caught.value.code == ErrorCode.ERROR_CODE_UNAVAILABLE
    await journal.close()
