"""Messages on a byte stream: a length of four bytes, then the message."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable

_LENGTH = struct.Struct("<I")


def frame(message: bytes) -> bytes:
    return _LENGTH.pack(len(message)) + message


class FrameReader(asyncio.Protocol):
    """Calls `on_message` with each whole message of a connection."""

    def __init__(self, on_message: Callable[[memoryview], None]) -> None:
        self._on_message = on_message
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        view, start = memoryview(data), 0
        while len(data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, start)
            end = start + _LENGTH.size + length
            if end > len(data):
                break
            self._on_message(view[start + _LENGTH.size : end])
            start = end
        self._rest = data[start:]
