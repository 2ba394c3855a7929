"""The scheduler's load, which SGLang publishes in shared memory after every step and while idle."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct

import msgspec

from kvmesh.common.errors import KvmeshError
from kvmesh.engine.contract import StoreTraffic
from kvmesh.v1.errors_pb2 import ErrorCode

# SGLang's layout: a header (magic, version, ranks, slot size), then a slot a rank (length, msgpack map).
_HEADER = struct.Struct("<4sHHI")
_LENGTH = struct.Struct("<I")
_MAGIC, _VERSION = b"SLNS", 2


class Disaggregation(msgspec.Struct, array_like=True):
    mode: str
    prefill_bootstrap_queue_reqs: int = 0
    prefill_inflight_queue_reqs: int = 0
    decode_prealloc_queue_reqs: int = 0
    decode_transfer_queue_reqs: int = 0


class SchedulerLoad(msgspec.Struct):
    """What is read of SGLang's snapshot; `num_cached_tokens` and `kvmesh_store` are the kvmesh plugin's."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_used_tokens: int = 0
    num_cached_tokens: int = 0
    kvmesh_store: StoreTraffic | None = None
    disaggregation: Disaggregation | None = None

    @property
    def transfers(self) -> int:
        split = self.disaggregation
        return split.prefill_inflight_queue_reqs + split.decode_transfer_queue_reqs if split else 0


class LoadReader:
    """Reads the first rank's slot; microseconds a read."""

    def __init__(self, path: str) -> None:
        """Raises KvmeshError(ENGINE_FAILED) where the file is not what this release of SGLang writes."""
        self._fd = os.open(path, os.O_RDONLY)
        self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        magic, version, _ranks, _slot = _HEADER.unpack_from(self._map)
        if (magic, version) != (_MAGIC, _VERSION):
            self.close()
            raise KvmeshError(
                ErrorCode.ERROR_CODE_ENGINE_FAILED,
                f"sglang's load file has version {version}, not {_VERSION}; "
                "install the release kvmesh-engine pins",
            )
        self._decode = msgspec.msgpack.Decoder(SchedulerLoad).decode
        self._last = SchedulerLoad()

    def read(self) -> SchedulerLoad:
        """The latest load; the one before while the scheduler is writing."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._last
        try:
            (length,) = _LENGTH.unpack_from(self._map, _HEADER.size)
            start = _HEADER.size + _LENGTH.size
            payload = self._map[start : start + length]
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        if payload:
            self._last = self._decode(payload)
        return self._last

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)
