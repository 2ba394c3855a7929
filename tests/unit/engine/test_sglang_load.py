"""The load file SGLang writes."""

from __future__ import annotations

import fcntl
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmesh.common.errors import KvmeshError
from kvmesh.engine.sglang.load import LoadReader

SLOT = 4096


def write(path: Path, version: int = 2, **snapshot: Any) -> None:
    payload = msgspec.msgpack.encode(snapshot) if snapshot else b""
    head = struct.pack("<4sHHI", b"SLNS", version, 1, SLOT) + struct.pack("<I", len(payload))
    path.write_bytes((head + payload).ljust(len(head) + SLOT, b"\0"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "load"


def test_reads_what_is_needed_and_skips_the_rest(path: Path) -> None:
    write(
        path,
        num_waiting_reqs=3,
        num_used_tokens=160,
        num_cached_tokens=32,
        gen_throughput=1.5,
        disaggregation=["decode", 0, 1, 2, 4, 0, 0.0, 0.0],
    )
    reader = LoadReader(str(path))
    load = reader.read()
    assert (load.num_waiting_reqs, load.num_used_tokens, load.num_cached_tokens) == (3, 160, 32)
    assert load.transfers == 5
    reader.close()


def test_nothing_written_yet_is_no_load(path: Path) -> None:
    write(path)
    reader = LoadReader(str(path))
    assert reader.read().num_running_reqs == 0
    assert reader.read().transfers == 0
    reader.close()


def test_never_waits_for_the_writer(path: Path) -> None:
    write(path, num_running_reqs=2)
    reader = LoadReader(str(path))
    assert reader.read().num_running_reqs == 2
    with path.open("r+b") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        assert reader.read().num_running_reqs == 2
    reader.close()


def test_another_layout_is_refused(path: Path) -> None:
    write(path, version=3)
    with pytest.raises(KvmeshError, match="version 3"):
        LoadReader(str(path))
