"""Where the halves of a split request meet: one TCP connection a room, JSON lines.

decode -> prefill   {"room": R, "cached_blocks": N}    N leading blocks decode has already
prefill -> decode   {"accepted": true}                 the request is there
prefill -> decode   {"token": T, "bytes": B, ...}      computed and handed over

Either side leaves by closing the connection, which frees the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

from kvmesh.common.errors import KvmeshError
from kvmesh.engine.contract import Bootstrap
from kvmesh.v1.errors_pb2 import ErrorCode

MAX_LINE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Handover:
    """What decode gets: the first token, and what its KV was and took."""

    token: int
    bytes: int
    transfer_s: float
    # Prompt tokens the prefill engine did not have to compute.
    cached: int


class Peer(asyncio.Protocol):
    """A decode engine at the prefill engine's door."""

    def __init__(self, server: BootstrapServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._expiry: asyncio.TimerHandle | None = None
        self.room: int | None = None
        self.cached_blocks = 0
        # Called once when the peer leaves before its handover; set by whoever serves it.
        self.on_left: Callable[[], None] | None = None

    def accept(self) -> None:
        """Tell the peer that its request is here."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._send({"accepted": True})

    def hand_over(self, handover: Handover) -> None:
        """End the exchange with its result."""
        self.on_left = None
        self._send(asdict(handover))
        self.close()

    def close(self) -> None:
        self.on_left = None
        if self._transport is not None:
            self._transport.close()

    def expire_in(self, seconds: float) -> None:
        """Leave unless accepted in time."""
        self._expiry = asyncio.get_running_loop().call_later(seconds, self.close)

    def _send(self, message: dict[str, Any]) -> None:
        if self._transport is not None:
            self._transport.write(json.dumps(message).encode() + b"\n")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)
        self._server.entered(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self.room is not None or len(self._received) > MAX_LINE_BYTES:
            # A peer says one thing only.
            self.close()
        elif b"\n" in self._received:
            try:
                hello = json.loads(self._received)
                self.room, self.cached_blocks = int(hello["room"]), int(hello["cached_blocks"])
            except (ValueError, KeyError, TypeError):
                self.close()
                return
            self._server.arrived(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._expiry is not None:
            self._expiry.cancel()
        self._server.left(self)
        on_left, self.on_left = self.on_left, None
        if on_left is not None:
            on_left()


class BootstrapServer:
    """Brings peers and requests of one room together, whichever comes first."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._server: asyncio.Server | None = None
        self._peers: set[Peer] = set()
        self._early: dict[int, Peer] = {}
        self._expected: dict[int, Callable[[Peer], None]] = {}

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises KvmeshError(UNAVAILABLE) when it cannot be had."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: Peer(self), host, port)
        except OSError as error:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_UNAVAILABLE,
                f"cannot listen on {host}:{port} ({error.strerror}); "
                "set `worker.bootstrap_port` to another port",
            ) from None
        return self._server.sockets[0].getsockname()[1]

    def expect(self, room: int, on_peer: Callable[[Peer], None]) -> None:
        """Call `on_peer` once, perhaps at once, with the peer that shows up in `room`."""
        peer = self._early.pop(room, None)
        if peer is None:
            self._expected[room] = on_peer
        else:
            on_peer(peer)

    def forget(self, room: int) -> None:
        """Nobody waits in `room` any more; a peer that comes later times out by itself."""
        self._expected.pop(room, None)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            for peer in list(self._peers):
                peer.close()
            await self._server.wait_closed()
            self._server = None

    def entered(self, peer: Peer) -> None:
        self._peers.add(peer)
        peer.expire_in(self._timeout_s)

    def arrived(self, peer: Peer) -> None:
        assert peer.room is not None
        on_peer = self._expected.pop(peer.room, None)
        if on_peer is not None:
            on_peer(peer)
        else:
            self._early[peer.room] = peer

    def left(self, peer: Peer) -> None:
        self._peers.discard(peer)
        if peer.room is not None and self._early.get(peer.room) is peer:
            del self._early[peer.room]


async def receive(bootstrap: Bootstrap, cached_blocks: int, timeout_s: float) -> Handover:
    """Decode's side of one room. Cancelling it leaves the room.

    Raises KvmeshError(WORKER_LOST) when the prefill engine is not there within `timeout_s`, or leaves.
    """
    where = f"prefill engine at {bootstrap.host}:{bootstrap.port}"
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(
                bootstrap.host, bootstrap.port, limit=MAX_LINE_BYTES
            )
            hello = {"room": bootstrap.room, "cached_blocks": cached_blocks}
            writer.write(json.dumps(hello).encode() + b"\n")
            accepted = await reader.readline()
        # Once accepted, prefill may take its time; if it dies the connection ends.
        line = await reader.readline() if accepted else b""
    except TimeoutError:
        raise _lost(f"the {where} did not take the request within {timeout_s:g} s") from None
    except OSError as error:
        raise _lost(f"the {where} cannot be reached: {error.strerror or error}") from None
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
    if not line.endswith(b"\n"):
        raise _lost(f"the {where} gave the request up")
    return Handover(**json.loads(line))


def _lost(message: str) -> KvmeshError:
    return KvmeshError(ErrorCode.ERROR_CODE_WORKER_LOST, message)
