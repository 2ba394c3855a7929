"""Messages on a byte stream, however the stream is cut."""

from __future__ import annotations

import pytest

from kvmesh.engine.sglang.frames import FrameReader, frame

MESSAGES = [b"first", b"", b"x" * 100_000, b"last"]
STREAM = b"".join(frame(message) for message in MESSAGES)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 4_096, 65_536, len(STREAM)])
def test_messages_come_whole_and_in_order(size: int) -> None:
    got: list[bytes] = []
    reader = FrameReader(lambda view: got.append(bytes(view)))
    # Single bytes over the whole long message would take quadratic time for nothing.
    stream = STREAM if size > 5 else frame(b"ab") + frame(b"") + frame(b"c")
    for start in range(0, len(stream), size):
        reader.data_received(stream[start : start + size])
    assert got == (MESSAGES if size > 5 else [b"ab", b"", b"c"])


def test_an_unfinished_message_waits() -> None:
    got: list[bytes] = []
    reader = FrameReader(lambda view: got.append(bytes(view)))
    reader.data_received(frame(b"one") + frame(b"two")[:5])
    assert got == [b"one"]
    reader.data_received(frame(b"two")[5:])
    assert got == [b"one", b"two"]
