"""Records that are kept, bounded, and their owners' alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvmesh.common.config import StoreConfig
from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.store.contract import Record
from kvmesh.frontend.store.sqlite import SqliteStore
from kvmesh.v1.errors_pb2 import ErrorCode

KIND = "response"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def open_store(path: Path, clock: Clock) -> SqliteStore:
    return SqliteStore(StoreConfig(path=str(path / "db"), max_age_s=100, max_bytes=100), path, clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[SqliteStore]:
    store = open_store(tmp_path, clock)
    yield store
    await store.close()


def record(id: str, size: int = 10, owner: str = "me", parent: str = "") -> Record:
    return Record(KIND, id, owner, id.encode().ljust(size, b"."), parent, 5.0)


async def test_what_is_put_is_there_for_its_owner(store: SqliteStore) -> None:
    kept = record("a")
    await store.put(kept)
    assert await store.get(KIND, "me", "a") == kept
    assert await store.get(KIND, "you", "a") is None
    assert await store.get("other", "me", "a") is None
    assert await store.chain(KIND, "you", "a", 9) == []
    assert not await store.delete(KIND, "you", "a")
    assert await store.delete(KIND, "me", "a")
    assert not await store.delete(KIND, "me", "a")


async def test_records_are_found_by_their_labels_names(store: SqliteStore) -> None:
    one, two = (
        replace(record(id, created), labels=dict.fromkeys(names, ""), created=created)
        for id, created, names in (("a", 2, "xz"), ("b", 1, "yz"))
    )
    for kept in (one, two):
        await store.put(kept)
    found = await store.labelled(KIND, "me", ["z", "y", "nothing"])
    assert [kept.id for kept in found] == ["b", "a"]
    assert [kept.id for kept in await store.labelled(KIND, "me", ["x"])] == ["a"]
    assert await store.labelled(KIND, "you", ["x"]) == []
    await store.delete(KIND, "me", "a")
    assert await store.labelled(KIND, "me", ["x"]) == []


async def test_only_what_is_there_is_replaced(store: SqliteStore) -> None:
    assert not await store.replace(record("a"))
    await store.put(record("a"))
    assert not await store.replace(record("a", owner="you"))
    assert await store.replace(record("a", 20))
    assert await store.get(KIND, "me", "a") == record("a", 20)
    # Nor what another has replaced meanwhile.
    assert not await store.replace(record("a", 30), record("a").body)
    assert await store.get(KIND, "me", "a") == record("a", 20)
    assert await store.replace(record("a", 30), record("a", 20).body)


async def test_it_outlives_the_process_and_is_shared(
    store: SqliteStore, tmp_path: Path, clock: Clock
) -> None:
    await store.put(record("a", 40))
    other = open_store(tmp_path, clock)
    await other.put(record("b", 40))
    assert await store.get(KIND, "me", "b") is not None
    await other.put(record("c", 40))
    # What one process keeps counts for the other.
    assert await store.get(KIND, "me", "a") is None
    await other.close()
    assert (tmp_path / "db").stat().st_mode & 0o077 == 0


async def test_the_longest_unused_go_first(store: SqliteStore, clock: Clock) -> None:
    for id in "abcd":
        await store.put(record(id, 25))
        clock.now += 1
    await store.get(KIND, "me", "a")
    clock.now += 1
    await store.put(record("e", 50))
    there = [id for id in "abcde" if await store.get(KIND, "me", id)]
    assert there == ["a", "d", "e"]


async def test_a_record_takes_the_room_of_the_one_it_replaces(store: SqliteStore) -> None:
    await store.put(record("a", 50))
    for _ in range(5):
        await store.put(record("b", 50))
    assert await store.get(KIND, "me", "a") is not None
    with pytest.raises(KvmeshError) as caught:
        await store.put(record("b", 101))
    assert caught.value.code == ErrorCode.ERROR_CODE_PAYLOAD_TOO_LARGE
    assert await store.get(KIND, "me", "b") is not None


async def test_age_counts_from_the_last_use(store: SqliteStore, clock: Clock) -> None:
    await store.put(record("a"))
    await store.put(record("b", parent="a"))
    await store.put(record("c"))
    clock.now += 90
    assert [each.id for each in await store.chain(KIND, "me", "b", 9)] == ["a", "b"]
    clock.now += 90
    assert await store.get(KIND, "me", "c") is None
    assert [each.id for each in await store.chain(KIND, "me", "b", 9)] == ["a", "b"]


async def test_a_broken_or_endless_chain(store: SqliteStore) -> None:
    await store.put(record("a", parent="gone"))
    await store.put(record("b", parent="a"))
    with pytest.raises(KvmeshError) as caught:
        await store.chain(KIND, "me", "b", 9)
    assert caught.value.code == ErrorCode.ERROR_CODE_NOT_FOUND
    await store.put(record("gone", parent="b"))
    with pytest.raises(KvmeshError) as caught:
        await store.chain(KIND, "me", "b", 9)
    assert caught.value.code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    # The owner of what is continued must be the same.
    await store.put(record("theirs", owner="you"))
    await store.put(record("mine", parent="theirs"))
    with pytest.raises(KvmeshError) as caught:
        await store.chain(KIND, "me", "mine", 9)
    assert caught.value.code == ErrorCode.ERROR_CODE_NOT_FOUND


async def test_a_medium_that_fails(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "db").write_bytes(b"not a database" * 100)
    store = open_store(tmp_path, clock)
    with pytest.raises(KvmeshError, match=r"frontend\.store\.path") as caught:
        await store.put(record("a"))
    assert caught.value.code == ErrorCode.ERROR_CODE_UNAVAILABLE
    await store.close()


async def test_labels_find_records_and_go_with_them(store: SqliteStore, clock: Clock) -> None:
    for i, id in enumerate("abcd"):
        labels = {"x": str(i % 2), "y": "1"}
        await store.put(Record(KIND, id, "you" if id == "d" else "me", b".", created=float(i), labels=labels))

    async def found(
        labels: dict[str, str], after: str = "", limit: int = 9, newest_first: bool = False
    ) -> str:
        page = await store.page(KIND, "me", labels, after, limit, newest_first=newest_first)
        return "".join(record.id for record in page.records) + ("+" if page.more else "")

    assert await found({}) == "abc"
    assert await found({}, newest_first=True) == "cba"
    assert await found({"x": "0", "y": "1"}) == "ac"
    assert await found({"x": "1", "y": "0"}) == ""
    assert (await found({}, limit=2), await found({}, "b", 2), await found({}, "c")) == ("ab+", "c", "")
    with pytest.raises(KvmeshError) as caught:
        await found({}, "d")
    assert (caught.value.code, caught.value.param) == (ErrorCode.ERROR_CODE_NOT_FOUND, "after")
    await store.delete(KIND, "me", "a")
    await store.put(Record(KIND, "a", "me", b".", created=9.0))
    assert await found({"x": "0"}) == "c"
    assert await found({}) == "bca"


async def test_what_is_listed_is_not_used_and_labels_take_room(store: SqliteStore, clock: Clock) -> None:
    await store.put(record("a"))
    clock.now += 90
    await store.page(KIND, "me", {}, "", 9, newest_first=False)
    clock.now += 20
    assert await store.get(KIND, "me", "a") is None
    with pytest.raises(KvmeshError) as caught:
        await store.put(Record(KIND, "b", "me", b".", labels={"x": "." * 100}))
    assert caught.value.code == ErrorCode.ERROR_CODE_PAYLOAD_TOO_LARGE
