"""Batches are applied in order or not at all."""

from __future__ import annotations

from random import Random

import pytest

from kvmesh.common.events import stream as stream_module
from kvmesh.common.events.stream import EventStream, Verdict
from kvmesh.v1.events_pb2 import KvEventBatch


class Log:
    """What was applied since the last reset."""

    def __init__(self) -> None:
        self.applied: list[tuple[int, int]] = []
        # Batches after which the digests do not agree.
        self.wrong: set[int] = set()
        self.stream = EventStream(self.apply, self.applied.clear)

    def apply(self, batch: KvEventBatch) -> bool:
        self.applied.append((batch.incarnation, batch.sequence))
        return batch.sequence not in self.wrong

    def receive(self, sequence: int, incarnation: int = 1) -> Verdict:
        return self.stream.receive(KvEventBatch(incarnation=incarnation, sequence=sequence))

    def restore(self, sequence: int, incarnation: int = 1, parts: int = 1) -> bool:
        self.stream.begin(incarnation)
        batch = KvEventBatch(incarnation=incarnation, sequence=sequence)
        for part in range(parts):
            self.stream.load(batch, last=part == parts - 1)
        return self.stream.live

    def sequences(self) -> list[int]:
        return [sequence for _, sequence in self.applied]


@pytest.fixture
def log() -> Log:
    return Log()


def test_a_life_begins_with_its_first_batch(log: Log) -> None:
    assert not log.stream.live
    assert [log.receive(n) for n in (1, 2, 3)] == [Verdict.APPLIED] * 3
    assert log.stream.live


def test_joining_late_waits_for_a_snapshot(log: Log) -> None:
    assert log.receive(8) is Verdict.HELD
    assert log.receive(9) is Verdict.HELD
    assert log.applied == []
    assert log.restore(7)
    assert log.sequences() == [7, 8, 9]
    assert log.receive(10) is Verdict.APPLIED


def test_a_snapshot_newer_than_held_batches(log: Log) -> None:
    log.receive(8)
    log.receive(9)
    assert log.restore(9)
    assert log.sequences() == [9]
    assert log.receive(10) is Verdict.APPLIED


def test_what_comes_between_the_parts_of_a_snapshot_waits(log: Log) -> None:
    log.receive(8)
    log.stream.begin(1)
    snapshot = KvEventBatch(incarnation=1, sequence=8)
    log.stream.load(snapshot, last=False)
    assert log.receive(9) is Verdict.HELD
    assert log.receive(1) is Verdict.HELD, "the empty state is not what is there now"
    assert not log.stream.live
    assert log.stream.load(snapshot, last=True) is Verdict.APPLIED
    assert log.stream.live
    assert log.sequences() == [8, 8, 9]


def test_a_gap_holds_what_follows_until_it_is_filled(log: Log) -> None:
    log.receive(1)
    assert log.receive(3) is Verdict.GAP
    assert log.receive(4) is Verdict.HELD
    assert not log.stream.live
    assert log.stream.behind == 3
    assert log.sequences() == [1], "what is known stays until something better comes"
    assert log.receive(2) is Verdict.APPLIED
    assert log.sequences() == [1, 2, 3, 4]
    assert log.stream.live


def test_a_gap_that_cannot_be_filled_is_bridged_by_a_snapshot(log: Log) -> None:
    log.receive(1)
    log.receive(3)
    log.stream.doubt()
    assert log.receive(2) is Verdict.HELD, "the answer that said so may cross it"
    assert log.sequences() == [1]
    assert log.restore(3)
    assert log.sequences() == [3]


def test_duplicates_are_dropped(log: Log) -> None:
    for n in (1, 2, 3):
        log.receive(n)
    assert log.receive(2) is Verdict.DUPLICATE
    assert log.receive(3) is Verdict.DUPLICATE
    assert log.sequences() == [1, 2, 3]


def test_a_restart_voids_everything(log: Log) -> None:
    log.receive(1)
    log.receive(2)
    assert log.receive(1, incarnation=2) is Verdict.APPLIED
    assert log.applied == [(2, 1)]
    log.receive(2, incarnation=2)
    assert log.receive(9, incarnation=3) is Verdict.HELD
    assert log.applied == []
    assert log.restore(8, incarnation=3)
    assert log.applied == [(3, 8), (3, 9)]


def test_batches_of_a_former_life_are_stale(log: Log) -> None:
    log.receive(1, incarnation=2)
    assert log.receive(2, incarnation=1) is Verdict.STALE
    assert log.stream.live
    log.stream.expect(7)
    assert log.receive(2, incarnation=2) is Verdict.STALE


def test_a_gap_while_the_snapshot_was_under_way(log: Log) -> None:
    log.receive(5)
    log.receive(7)
    assert not log.restore(4)
    assert log.sequences() == [4, 5]
    assert log.receive(8) is Verdict.HELD
    assert log.restore(7)
    assert log.sequences() == [7, 8]


def test_too_many_held_batches_are_brought_by_the_repair(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "MAX_HELD_BATCHES", 10)
    for n in range(5, 105):
        log.receive(n)
    assert not log.restore(4)
    assert log.sequences() == list(range(4, 15))
    for n in range(15, 105):
        log.receive(n)
    assert log.stream.live


def test_a_wrong_digest_forgets_everything(log: Log) -> None:
    log.wrong = {3}
    log.receive(1)
    log.receive(2)
    assert log.receive(3) is Verdict.DIVERGED
    assert log.applied == []
    assert not log.stream.live
    assert log.receive(4) is Verdict.HELD
    assert log.restore(4)
    assert log.sequences() == [4]


def test_a_wrong_digest_among_held_batches(log: Log) -> None:
    log.wrong = {3}
    log.receive(1)
    log.receive(3)
    assert log.receive(2) is Verdict.DIVERGED
    assert log.applied == []
    log.wrong = set()
    assert [log.receive(n) for n in (1, 2, 3)] == [Verdict.APPLIED] * 3
    assert log.stream.live


def test_a_snapshot_that_does_not_agree_is_taken_again(log: Log) -> None:
    log.wrong = {6}
    log.receive(6)
    assert not log.restore(6)
    assert log.applied == []
    log.wrong = set()
    assert log.restore(6)


def test_a_holder_nobody_can_ask_starts_where_it_is_heard(log: Log) -> None:
    log.receive(5)
    log.stream.start_at(KvEventBatch(incarnation=1, sequence=5))
    assert log.stream.live
    assert log.receive(6) is Verdict.APPLIED
    assert log.sequences() == [5, 6]


@pytest.mark.parametrize("seed", range(30))
def test_random_losses_end_equal_to_the_truth(seed: int, log: Log) -> None:
    """Loss, duplicates, reordering, restarts; repairs come late. In the end exactly the life is applied."""
    random = Random(seed)
    incarnation, sequence = 1, 0
    late: list[tuple[int, int]] = []
    for _ in range(500):
        if random.random() < 0.02:
            incarnation, sequence = incarnation + 1, 0
        sequence += 1
        late.append((sequence, incarnation))
        if random.random() < 0.1:
            late.pop()
        random.shuffle(late)
        while late and random.random() < 0.8:
            log.receive(*late[-1])
            if random.random() < 0.9:
                late.pop()
        if not log.stream.live and random.random() < 0.1:
            log.restore(sequence, incarnation)
    for missing in range(1, sequence + 1):
        log.receive(missing, incarnation)
    log.receive(sequence + 1, incarnation)
    assert log.stream.live
    assert (log.stream.incarnation, log.stream.sequence) == (incarnation, sequence + 1)
    assert {life for life, _ in log.applied} == {incarnation}
    applied = log.sequences()
    assert applied == list(range(applied[0], sequence + 2))
