"""Streams of the data plane: gRPC, in Rust, on the event loop's own thread, handled by callbacks.

A message through grpc's asyncio API costs wake-ups of its threads, which is most of its CPU; here it costs
the loop's alone (`benchmarks/streams.py`). What a turn of the loop sends leaves at its end. A stream's two
ends are a `Stream`, to send by, and a `StreamHandler`, told what comes, as asyncio's transports and protocols
are. Both ends may be met by any other gRPC library.

A unary call that is served here is a stream of one message each way: its handler hears the one, and answers.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import grpc
import structlog

from kvmesh.common.errors import BARE_STATUS, KvmeshError, carried_error, invalid
from kvmesh.common.grpc.server import shutting_down
from kvmesh.common.grpc.trailers import error_trailers
from kvmesh.common.metrics import RpcMetrics
from kvmesh.common.telemetry import span
from kvmesh.common.tls import MeshTls
from kvmesh.core import Streams
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

_STATUS = {status.value[0]: status for status in grpc.StatusCode}


class StreamHandler(Protocol):
    """Who uses a stream. Called on the event loop; must not block."""

    def on_message(self, message: bytes) -> None:
        """Raising a KvmeshError ends a served stream with it."""
        ...

    def on_half_close(self) -> None:
        """The caller of a served stream will send no more."""
        ...

    def on_writable(self) -> None:
        """All that was sent has left, after a `send` that returned False."""
        ...

    def on_closed(self, error: KvmeshError | None) -> None:
        """The stream is over, by an error or in order; the last call."""
        ...


class CallHandler(StreamHandler):
    """Who answers a unary call: hears one message, and of its end if that matters to it."""

    def on_half_close(self) -> None:
        """Of streams only."""

    def on_writable(self) -> None:
        """Of streams only."""

    def on_closed(self, error: KvmeshError | None) -> None: ...


# Gives a served stream its handler, or raises the KvmeshError that refuses it.
Accept = Callable[["Stream"], StreamHandler]
AcceptCall = Callable[["Call"], CallHandler]


class Stream:
    """One end of a stream. Nothing blocks; after `on_closed` nothing has an effect."""

    __slots__ = ("_hub", "handler", "id", "served")

    def __init__(self, hub: StreamHub, stream_id: int) -> None:
        self.id = stream_id
        self.handler: StreamHandler
        # Its method and the time it was opened; of served streams only.
        self.served: tuple[str, float] | None = None
        self._hub = hub

    def send(self, message: bytes) -> bool:
        """False when the other end is behind: better send nothing until `on_writable`."""
        return self._hub.send(self, message)

    def end(self) -> None:
        """Send no more. A served stream ends in order, an opened one waits for the other end."""
        self._hub.end(self)

    def fail(self, error: KvmeshError) -> None:
        """End a served stream with an error, after what was sent.

        The handler is told at once and hears no more, however long the other end takes to read that far.
        """
        self._hub.fail(self, error)

    def cancel(self) -> None:
        """End an opened stream at once; its handler hears nothing of it any more."""
        self._hub.forget(self)


class Call(Stream):
    """A served unary call: to be answered once, or failed, unless its handler is told of an error before.

    Its span is open from its message to its end, in a context of its own.
    """

    __slots__ = ("_context", "_span")

    def __init__(self, hub: StreamHub, stream_id: int, method: str, traceparent: str) -> None:
        super().__init__(hub, stream_id)
        self._context = contextvars.Context()
        self._span = span(method, parent=traceparent)

    def answer(self, message: bytes) -> None:
        """With OK, unless it has left by then."""
        self.send(message)
        self.end()

    # The hub's.

    def run(self, message: bytes) -> None:
        self._context.run(self._span.__enter__)
        self._context.run(self.handler.on_message, message)

    def over(self, error: KvmeshError | None) -> None:
        self._context.run(self._span.__exit__, type(error) if error else None, error, None)


class StreamHub:
    """The streams of one event loop. `close` when done; streams still open are cut then."""

    def __init__(self, metrics: RpcMetrics | None = None, tls: MeshTls | None = None) -> None:
        """`metrics` count the served streams."""
        self.streams = Streams()
        self._tls = tls
        if tls is not None:
            self._secure()
            tls.on_change(self._secure)
        self._metrics = metrics
        self._open: dict[int, Stream] = {}
        self._accept: dict[str, Callable[[Any], StreamHandler]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        # Set once no unary call is under way; there since `drain`.
        self._answered: asyncio.Event | None = None
        self._loop = asyncio.get_running_loop()
        # Outside of whatever request caused this: what comes belongs to no trace.
        self._context = contextvars.Context()
        # A look at the streams is due in this turn of the loop.
        self._due: asyncio.Handle | None = None
        self._closed = False
        self._context.run(self._loop.add_reader, self.streams.fileno(), self._drain)

    def serve(
        self,
        host: str,
        port: int,
        streams: Mapping[str, Accept],
        others: str,
        unary: Mapping[str, AcceptCall] | None = None,
    ) -> int:
        """Serve methods, by path, as streams and as unary calls; others go to the gRPC server on the unix
        socket `others`, and so do unary calls whose messages are compressed.

        Returns the port. Raises OSError when it cannot listen there.
        """
        unary = unary or {}
        self._accept.update(streams)
        self._accept.update(unary)
        port = self.streams.listen(host, port, set(streams), set(unary), others)
        self._look_soon()
        return port

    def open(self, address: str, method: str, handler: StreamHandler) -> Stream:
        """Open a stream of `method`, a path, to `host:port`, on a connection of its own."""
        if self._tls is not None:
            self._tls.refresh()
        stream = Stream(self, self.streams.open(address, method))
        stream.handler = handler
        self._add(stream)
        self._look_soon()
        return stream

    def send(self, stream: Stream, message: bytes) -> bool:
        self._look_soon()
        return self.streams.send(stream.id, message)

    def end(self, stream: Stream) -> None:
        self._look_soon()
        self.streams.end(stream.id)

    async def drain(self, seconds: float) -> bool:
        """Refuse unary calls from now on; whether those under way ended in time."""
        self._answered = asyncio.Event()
        self._look_for_calls()
        return await _within(seconds, self._answered)

    async def drained(self, seconds: float) -> bool:
        """Wait until no stream is open, at most so long; whether that came true."""
        return await _within(seconds, self._idle)

    def forget(self, stream: Stream) -> None:
        self._look_soon()
        self._remove(stream)
        self.streams.cancel(stream.id)

    def fail(self, stream: Stream, error: KvmeshError) -> None:
        self._look_soon()
        self.streams.fail(stream.id, error.spec.grpc.value[0], error.message, error_trailers(error))
        self._close(stream, error)

    def close(self) -> None:
        """Cut all streams, telling their handlers, and stop listening. Idempotent."""
        self._closed = True
        if self._due is not None:
            self._due.cancel()
        self._loop.remove_reader(self.streams.fileno())
        self.streams.close()
        gone = KvmeshError(ErrorCode.ERROR_CODE_CANCELLED, "the stream was cut")
        for stream in list(self._open.values()):
            self._close(stream, gone)

    def _secure(self) -> None:
        assert self._tls is not None
        try:
            self.streams.secure(*self._tls.pem, self._tls.require_client, self._tls.config.server_name)
        except OSError as error:
            # OpenSSL takes files that rustls does not.
            raise invalid(f"cannot use the certificate {self._tls.config.cert}: {error}") from None

    def _look_soon(self) -> None:
        if self._due is None and not self._closed:
            self._due = self._loop.call_soon(self._look, context=self._context)

    def _look(self) -> None:
        self._due = None
        self._drain()

    def _drain(self) -> None:
        for kind, stream_id, content in self.streams.poll():
            if kind == "opened":
                stream = Stream(self, stream_id)
                stream.served = (content, time.perf_counter())
            elif kind == "called":
                method, traceparent, content = content
                stream = Call(self, stream_id, method, traceparent)
                stream.served = (method, time.perf_counter())
            elif (known := self._open.get(stream_id)) is not None:
                stream = known
            else:
                continue
            # Whatever a handler does wrong ends its own stream: the events behind belong to others.
            try:
                self._deliver(stream, kind, content)
            except KvmeshError as error:
                self._broke(stream, error)
            except Exception:
                log.exception("stream failed", stream=stream_id)
                error = KvmeshError(ErrorCode.ERROR_CODE_INTERNAL, "internal error; see the server's log")
                self._broke(stream, error)

    def _deliver(self, stream: Stream, kind: str, content: Any) -> None:
        if kind == "message":
            stream.handler.on_message(content)
        elif kind == "closed":
            self._close(stream, _error(*content))
        elif kind == "writable":
            stream.handler.on_writable()
        elif kind == "half_closed":
            stream.handler.on_half_close()
        else:
            self._begin(stream)
            if isinstance(stream, Call):
                if self._answered is not None:
                    raise shutting_down()
                stream.run(content)

    def _begin(self, stream: Stream) -> None:
        assert stream.served is not None
        method, _ = stream.served
        stream.handler = self._accept[method](stream)
        self._add(stream)
        if self._metrics is not None:
            self._metrics.in_flight_of(method).inc()

    def _broke(self, stream: Stream, error: KvmeshError) -> None:
        """A handler raised, or there is none: the stream ends for both ends."""
        try:
            if stream.served is not None:
                self.fail(stream, error)
            else:
                self._look_soon()
                self.streams.cancel(stream.id)
                self._close(stream, error)
        except Exception:
            log.exception("stream not closed", stream=stream.id)

    def _close(self, stream: Stream, error: KvmeshError | None) -> None:
        """Tell the handler, once."""
        if self._open.get(stream.id) is not stream:
            return
        self._remove(stream)
        if stream.served is not None and self._metrics is not None:
            method, began = stream.served
            status = error.spec.grpc if error is not None else grpc.StatusCode.OK
            self._metrics.in_flight_of(method).dec()
            self._metrics.ended_as(method, status.name).inc()
            self._metrics.duration_of(method).observe(time.perf_counter() - began)
        if isinstance(stream, Call):
            stream.over(error)
        stream.handler.on_closed(error)

    def _add(self, stream: Stream) -> None:
        self._open[stream.id] = stream
        self._idle.clear()

    def _remove(self, stream: Stream) -> None:
        self._open.pop(stream.id, None)
        if not self._open:
            self._idle.set()
        self._look_for_calls()

    def _look_for_calls(self) -> None:
        if self._answered is not None and not any(isinstance(s, Call) for s in self._open.values()):
            self._answered.set()


async def _within(seconds: float, event: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _error(code: int, message: str, details: Mapping[str, bytes]) -> KvmeshError | None:
    if not code:
        return None
    status = _STATUS.get(code, grpc.StatusCode.UNKNOWN)
    return carried_error(details.items()) or KvmeshError(BARE_STATUS[status], message or status.name.lower())
