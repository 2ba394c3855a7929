"""ZeroMQ sockets on an asyncio loop with no task and no future for a message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

# Messages handled before other callbacks of the loop get their turn.
_AT_ONCE = 64


class Receiver:
    """Calls `on_message` with the frames of each message, from the loop it was made on."""

    def __init__(self, socket: zmq.Socket[bytes], on_message: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        # The descriptor tells of changes only: what came before is not told.
        self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        socket = self._socket
        for _ in range(_AT_ONCE):
            # Asking is far cheaper than an exception; it also arms the descriptor again.
            if socket.closed or not int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return
            frames = [socket.recv(zmq.NOBLOCK)]
            while socket.getsockopt(zmq.RCVMORE):
                frames.append(socket.recv(zmq.NOBLOCK))
            self._on_message(frames)
        self._loop.call_soon(self._drain)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._socket.close(linger=0)
