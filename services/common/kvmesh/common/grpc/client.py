"""Channels to other roles: one a peer, shared by every stub.

Calls carry the current span as `traceparent`, and unary calls a deadline. This is done by a thin channel
rather than by grpc's client interceptors, which proxy every message of a stream and have lost cancellations.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio

from kvmesh.common import trace
from kvmesh.common.grpc.server import MAX_MESSAGE_BYTES
from kvmesh.common.tls import MeshTls

# Seconds; of unary calls made without a timeout of their own.
DEFAULT_TIMEOUT_S = 10.0

OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A peer that vanished without closing its connection is noticed in 15 s while streams are open.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # A peer that restarts is found again within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Mesh traffic never takes the machine's web proxy.
    ("grpc.enable_http_proxy", 0),
]


class Channels:
    """One channel per address, made at first use and kept. Belongs to one event loop."""

    def __init__(self, tls: MeshTls | None = None) -> None:
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}
        # With certificates that have been replaced; calls may be on them.
        self._replaced: list[grpc.aio.Channel] = []
        self._version = 0

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to `host:port`; connects when first used."""
        self._look_at_certificate()
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = TracedChannel(self._open(address))
        return channel

    async def forget(self, address: str) -> None:
        """Close the channel of a peer that is gone; its calls are cancelled."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        """Close all channels; their calls are cancelled."""
        channels = [*self._channels.values(), *self._replaced]
        self._channels, self._replaced = {}, []
        await asyncio.gather(*(channel.close() for channel in channels))

    def _open(self, address: str) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(address, options=OPTIONS)
        options = [*OPTIONS, *self._tls.channel_options]
        return grpc.aio.secure_channel(address, self._tls.channel_credentials(), options=options)

    def _look_at_certificate(self) -> None:
        """A channel keeps the certificate it was made with: replaced ones take new channels."""
        if self._tls is None:
            return
        self._tls.refresh()
        if self._tls.version != self._version:
            self._version = self._tls.version
            self._replaced += self._channels.values()
            self._channels = {}


class TracedChannel(grpc.aio.Channel):
    """A channel whose calls carry `traceparent` and, if unary, a deadline."""

    def __init__(self, inner: grpc.aio.Channel) -> None:
        self._inner = inner

    async def __aenter__(self) -> TracedChannel:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._inner.__aexit__(*exc)

    async def close(self, grace: float | None = None) -> None:
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _Call(self._inner.unary_unary(*args, **kwargs), DEFAULT_TIMEOUT_S)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _Call(self._inner.unary_stream(*args, **kwargs), None)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _Call(self._inner.stream_unary(*args, **kwargs), None)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _Call(self._inner.stream_stream(*args, **kwargs), None)


class _Call:
    """A multi-callable that adds metadata and a deadline, and hands out grpc's own call object."""

    __slots__ = ("_inner", "_timeout")

    def __init__(self, inner: Any, timeout: float | None) -> None:
        self._inner = inner
        self._timeout = timeout

    def __call__(self, *args: Any, timeout: float | None = None, metadata: Any = None, **kwargs: Any) -> Any:
        context = trace.CURRENT.get()
        if context is not None:
            metadata = (*(metadata or ()), (trace.TRACEPARENT, str(context)))
        return self._inner(
            *args, timeout=self._timeout if timeout is None else timeout, metadata=metadata, **kwargs
        )
