"""The disk by itself: an allocated file, written and read in scattered order past the page cache."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
from pathlib import Path

from tier.memory import Figures, Memory, Stopwatch, spread

WRITE_DEPTH = 32
HAS_FIO = shutil.which("fio") is not None
NAME = "fio" if HAS_FIO else "direct I/O on threads, for there is no fio (apt-get install fio)"


class RawDisk:
    """By `fio` where it is installed, else by positioned direct I/O on as many threads as the depth says."""

    def __init__(self, memory: Memory, folder: Path) -> None:
        self.memory, self.path = memory, folder / "raw"
        descriptor = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_DIRECT)
        os.posix_fallocate(descriptor, 0, memory.items * memory.size)
        os.close(descriptor)
        self.run("write", WRITE_DEPTH)

    def round(self, threads: int) -> Figures:
        figures: Figures = {}
        for name, what, depth in (("put", "write", WRITE_DEPTH), ("get", "read", threads)):
            figures[name], figures[f"{name} cpu"] = self.run(what, depth)
        return figures

    def run(self, what: str, depth: int) -> tuple[float, float]:
        """GB/s, and CPU seconds a GB."""
        return self._fio(what, depth) if HAS_FIO else self._loop(what, depth)

    def _fio(self, what: str, depth: int) -> tuple[float, float]:
        memory = self.memory
        command = [
            *("fio", "--name=raw", f"--filename={self.path}", f"--rw=rand{what}", "--direct=1"),
            *(f"--bs={memory.size}", f"--iodepth={depth}", "--ioengine=io_uring", "--end_fsync=1"),
            *(f"--size={memory.items * memory.size}", "--output-format=json"),
        ]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        job = json.loads(output)["jobs"][0]
        # Of its time, in percent; the time in milliseconds.
        busy = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
        return job[what]["bw_bytes"] / 1e9, busy / memory.gigabytes

    def _loop(self, what: str, depth: int) -> tuple[float, float]:
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
            watch = Stopwatch()
            spread(memory.items, depth, move)
            if what == "write":
                os.fdatasync(descriptor)
            figures = watch.look(what, memory.gigabytes)
            return figures[what], figures[f"{what} cpu"]
        finally:
            os.close(descriptor)
