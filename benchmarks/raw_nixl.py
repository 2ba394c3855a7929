"""A bare NIXL transfer between two processes: what moving the same bytes as KV could cost at best."""

from __future__ import annotations

import mmap
import multiprocessing
import time
import uuid
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config


class RawNixl:
    """A pair of NIXL agents over DRAM; the other one lives in a child process. Use as a context manager."""

    def __init__(
        self,
        total_bytes: int,
        pieces: int,
        operation: Literal["WRITE", "READ"] = "WRITE",
        *,
        shared: bool = False,
    ) -> None:
        """`pieces` buffers of equal size, as an engine's K and V of every layer are; in memory that other
        processes may map, as an arena is, if `shared`.
        """
        self._operation, self._shared = operation, shared
        self.pieces, self.piece_bytes = pieces, total_bytes // pieces
        self.total_bytes = self.pieces * self.piece_bytes

    def __enter__(self) -> RawNixl:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._child = context.Process(
            target=_receive, args=(other, self.pieces, self.piece_bytes, self._shared), daemon=True
        )
        self._child.start()
        self._agent, self._memory, rows = _agent(self.pieces, self.piece_bytes, self._shared)
        metadata, remote_rows = self._pipe.recv()
        peer = self._agent.add_remote_agent(metadata)
        peer = peer.decode() if isinstance(peer, bytes) else peer
        self._handle = self._agent.initialize_xfer(
            self._operation,
            self._agent.get_xfer_descs(rows, "DRAM"),
            self._agent.get_xfer_descs(remote_rows, "DRAM"),
            peer,
        )
        return self

    def move(self) -> float:
        """Seconds for all bytes once."""
        start = time.perf_counter()
        state = self._agent.transfer(self._handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(self._handle)
        if state != "DONE":
            raise RuntimeError(f"NIXL transfer ended in state {state}")
        return time.perf_counter() - start

    def __exit__(self, *_: object) -> None:
        self._agent.release_xfer_handle(self._handle)
        self._pipe.send(None)
        self._child.join(10)
        self._child.kill()


def _agent(pieces: int, piece_bytes: int, shared: bool) -> tuple[nixl_agent, np.ndarray, np.ndarray]:
    size = pieces * piece_bytes
    memory = np.frombuffer(mmap.mmap(-1, size), np.uint8) if shared else np.empty(size, np.uint8)
    memory[:] = 1
    agent = nixl_agent(str(uuid.uuid4()), nixl_agent_config(backends=["UCX"]))
    base = memory.ctypes.data
    agent.register_memory([(base, memory.nbytes, 0, "")], "DRAM")
    rows = np.array([(base + piece * piece_bytes, piece_bytes, 0) for piece in range(pieces)], np.uint64)
    return agent, memory, rows


def _receive(pipe: Connection, pieces: int, piece_bytes: int, shared: bool) -> None:
    agent, _memory, rows = _agent(pieces, piece_bytes, shared)
    pipe.send((agent.get_agent_metadata(), rows))
    pipe.recv()
