"""The disk by itself: an allocated file, written and read in scattered order past the page cache."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import time
from pathlib import Path

from tier.memory import Figures, Memory, spread

WRITE_DEPTH = 32
HAS_FIO = shutil.which("fio") is not None
NAME = "fio" if HAS_FIO else "direct I/O on threads, for there is no fio"


class RawDisk:
    """By `fio` where it is installed, else by positioned direct I/O on as many threads as the depth says."""

    def __init__(self, memory: Memory, folder: Path) -> None:
        self.memory, self.path = memory, folder / "raw"
        descriptor = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_DIRECT)
        os.posix_fallocate(descriptor, 0, memory.items * memory.size)
        os.close(descriptor)
        self.run("write", WRITE_DEPTH)

    def round(self, threads: int) -> Figures:
        return {"put": self.run("write", WRITE_DEPTH), "get": self.run("read", threads)}

    def run(self, what: str, depth: int) -> float:
        """GB/s."""
        return self._fio(what, depth) if HAS_FIO else self._loop(what, depth)

    def _fio(self, what: str, depth: int) -> float:
        memory = self.memory
        command = [
            *("fio", "--name=raw", f"--filename={self.path}", f"--rw=rand{what}", "--direct=1"),
            *(f"--bs={memory.size}", f"--iodepth={depth}", "--ioengine=io_uring", "--end_fsync=1"),
            *(f"--size={memory.items * memory.size}", "--output-format=json"),
        ]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        return json.loads(output)["jobs"][0][what]["bw_bytes"] / 1e9

    def _loop(self, what: str, depth: int) -> float:
        memory, size = self.memory, self.memory.size
        descriptor = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        buffers = [mmap.mmap(-1, size) for _ in range(depth)]
        for buffer in buffers:
            buffer.write(memory.source[0].tobytes())
        free = list(buffers)

        def move(item: int) -> None:
            buffer = free.pop()
            if what == "write":
                os.pwritev(descriptor, [buffer], item * size)
            else:
                os.preadv(descriptor, [buffer], item * size)
            free.append(buffer)

        try:
            began = time.perf_counter()
            spread(memory.items, depth, move)
            if what == "write":
                os.fdatasync(descriptor)
            return memory.gigabytes / (time.perf_counter() - began)
        finally:
            os.close(descriptor)
