"""The scheduler's way out: length-prefixed messages on a unix stream, straight into the worker's loop.

SGLang sends by ZeroMQ, which wakes a thread of its own in the worker for every message; at one
message a step that is most of what receiving costs.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from typing import Any

from sglang.srt.managers.io_struct import msgpack_encode
from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper

from kvmesh.engine.sglang.environment import OUTPUTS
from kvmesh.engine.sglang.frames import frame


class OutputStream(SenderWrapper):
    """Takes the place of both of the scheduler's sockets to its frontend, so their order is kept too.

    Sending waits while the worker does not read: the engine is held back, nothing piles up.
    """

    def __init__(self, path: str) -> None:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.connect(path)
        self._stream = stream

    def send_output(self, output: Any, recv_obj: object | None = None) -> None:
        self._stream.sendall(frame(msgpack_encode(output)))


def divert_outputs(channels: Any, _cls: type, *, is_rank_zero: bool, **_options: Any) -> Any:
    """After `SchedulerIpcChannels.create`."""
    if not is_rank_zero:
        return channels
    stream = OutputStream(os.environ[OUTPUTS])
    return dataclasses.replace(channels, send_to_tokenizer=stream, send_to_detokenizer=stream)
