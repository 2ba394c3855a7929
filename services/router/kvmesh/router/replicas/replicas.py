"""The replicas of this router: gossip on NATS, at its times."""

from __future__ import annotations

import asyncio
import contextvars
import time

from kvmesh.common import metrics
from kvmesh.common.bus import Bus
from kvmesh.common.discovery import Discovery
from kvmesh.router.replicas.gossip import BEAT_MS, Gossip
from kvmesh.router.routing import Routing
from kvmesh.v1.router_pb2 import ReplicaState

SUBJECT = "kvmesh.replicas"
# What changes meanwhile is one message.
FLUSH_S = 0.004


class Replicas:
    """Lets replicas know of one another's leases while NATS answers. Belongs to one event loop."""

    def __init__(self, routing: Routing, discovery: Discovery, bus: Bus) -> None:
        self._routing = routing
        self._discovery = discovery
        self._bus = bus
        self._gossip: Gossip | None = None
        self._subject = ""
        self._flush: asyncio.TimerHandle | None = None
        self._beat: asyncio.TimerHandle | None = None
        self._generation = -1

    @property
    def me(self) -> str:
        """How the others know this replica; empty before `start`."""
        return self._gossip.me if self._gossip is not None else ""

    async def start(self, me: str) -> None:
        """Begin to speak and listen as `me`, which no other replica is called; returns at once."""
        incarnation = time.time_ns()
        routing, measured = self._routing, metrics.router()
        self._subject = f"{SUBJECT}.{incarnation:x}"
        gossip = self._gossip = Gossip(
            me,
            incarnation,
            routing.models,
            routing.leases,
            now=routing.turns.now,
            settle=routing.settle,
            send=self._send,
            wake=self._wake,
            metrics=measured,
        )
        measured.replicas.set_function(lambda: gossip.peers)
        measured.foreign_leases.set_function(lambda: len(gossip.foreign))
        measured.replica_lag.set_function(lambda: gossip.lag_ms() / 1000)
        routing.leases.tell(gossip)
        # After the routing, which has taken the workers over by then.
        self._discovery.subscribe(self._on_members)
        await self._bus.subscribe(f"{SUBJECT}.*", self._on_message)
        self._bus.on_reconnect(self._on_beat)
        self._on_beat()

    def close(self) -> None:
        """Say goodbye, and nothing more."""
        for handle in (self._flush, self._beat):
            if handle is not None:
                handle.cancel()
        self._flush = self._beat = None
        gossip, self._gossip = self._gossip, None
        if gossip is not None:
            gossip.leave()

    def leases(self) -> list[int]:
        """Those of the others that decisions count with."""
        return self._gossip.foreign.ids() if self._gossip is not None else []

    def state(self) -> list[ReplicaState]:
        return self._gossip.state() if self._gossip is not None else []

    def _send(self, message: bytes) -> None:
        # Without a bus nobody is there to miss it.
        if self._bus.connected:
            self._bus.publish(self._subject, message)

    def _on_message(self, subject: str, payload: bytes) -> None:
        if self._gossip is not None and subject != self._subject:
            self._gossip.receive(payload)

    def _on_members(self) -> None:
        if self._gossip is not None and self._generation != self._discovery.generation:
            self._generation = self._discovery.generation
            self._gossip.foreign.retry()

    def _wake(self) -> None:
        if self._flush is None:
            # Whatever request caused this: what is said belongs to many.
            self._flush = asyncio.get_running_loop().call_later(
                FLUSH_S, self._on_flush, context=contextvars.Context()
            )

    def _on_flush(self) -> None:
        self._flush = None
        if self._gossip is not None:
            self._gossip.flush()

    def _on_beat(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
        self._beat = asyncio.get_running_loop().call_later(
            BEAT_MS / 1000, self._on_beat, context=contextvars.Context()
        )
        if self._gossip is not None:
            self._gossip.beat()
