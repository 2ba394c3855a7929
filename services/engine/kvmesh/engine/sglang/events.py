"""The engine's KV events from SGLang's sockets: what they carry, and how what is missing is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import zmq

from kvmesh.engine.contract import KvEvent
from kvmesh.engine.sglang.event_order import EventOrder
from kvmesh.engine.sglang.sockets import Receiver

_END = -1
# SGLang looks for replay requests ten times a second.
_REPLAY_S = 2.0


class KvEventStream:
    """Subscribes to the engine that has its sockets in `directory`. Belongs to the loop it is made on."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], directory: str) -> None:
        self._loop = asyncio.get_running_loop()
        live = context.socket(zmq.SUB)
        live.setsockopt(zmq.RCVHWM, 0)
        live.setsockopt(zmq.SUBSCRIBE, b"")
        connection = live.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        live.connect(f"ipc://{directory}/events")
        self._replay = context.socket(zmq.DEALER)
        self._replay.connect(f"ipc://{directory}/replay")
        self._order = EventOrder(self._ask, self._emit)
        self._live_receiver = Receiver(live, self._on_live)
        self._replay_receiver = Receiver(self._replay, self._on_replay)
        self._connection_receiver = Receiver(connection, lambda _: self._order.check())
        self._asking: asyncio.TimerHandle | None = None
        self._caught_up = self._loop.create_future()
        self._pending: list[KvEvent] = []
        self._wake = asyncio.Event()

    @property
    def lost_batches(self) -> int:
        """Batches that could not be had."""
        return self._order.lost

    async def catch_up(self) -> None:
        """Return once every batch up to now has been received or declared lost."""
        self._order.check()
        await asyncio.shield(self._caught_up)

    async def events(self) -> AsyncGenerator[list[KvEvent], None]:
        while True:
            await self._wake.wait()
            self._wake.clear()
            events, self._pending = self._pending, []
            if events:
                yield events

    def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        if not self._caught_up.done():
            self._caught_up.cancel()
        self._connection_receiver.close()
        self._live_receiver.close()
        self._replay_receiver.close()

    def _on_live(self, frames: list[bytes]) -> None:
        _topic, number, payload = frames
        self._order.live(int.from_bytes(number, "big", signed=True), payload)

    def _on_replay(self, frames: list[bytes]) -> None:
        _delimiter, _topic, raw, payload = frames
        number = int.from_bytes(raw, "big", signed=True)
        if number != _END:
            self._order.replayed(number, payload)
            return
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
        self._order.answered()
        if self._asking is None and not self._caught_up.done():
            self._caught_up.set_result(None)

    def _emit(self, events: list[KvEvent]) -> None:
        self._pending += events
        self._wake.set()

    def _ask(self, first: int) -> None:
        """Ask for the batches from `first` on, again and again until it is answered."""
        if self._asking is not None:
            self._asking.cancel()
        self._replay.send_multipart([b"", first.to_bytes(8, "big")], zmq.NOBLOCK)
        self._asking = self._loop.call_later(_REPLAY_S, self._ask, first)
