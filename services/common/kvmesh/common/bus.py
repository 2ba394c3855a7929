"""The connection to NATS: messages while it is there, silence while it is not.

Nothing on the request path waits for the bus. Publishing drops what cannot be sent; receivers learn of losses
from the sequence numbers in the messages. A server that comes late, goes, or returns empty is all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from kvmesh.common import metrics, telemetry, trace
from kvmesh.common.config import Config
from kvmesh.common.tasks import cancel
from kvmesh.common.tls import MeshTls

log = structlog.get_logger()

Handler = Callable[[str, bytes], None]

# Waiting to be sent, at most; a server that stalls costs this much memory and then messages.
MAX_PENDING_BYTES = 16 << 20
# Per subscription; nats-py drops beyond it and reports a slow consumer.
MAX_UNREAD_MESSAGES = 65_536
MAX_UNREAD_BYTES = 64 << 20
RECONNECT_WAIT_S = 0.25


def bus_security(tls: MeshTls | None) -> dict[str, Any]:
    """What `nats.connect` is told of TLS."""
    if tls is None:
        return {}
    name = tls.config.server_name
    return {"tls": tls.context(), **({"tls_hostname": name} if name else {})}


class Bus:
    """One NATS connection, kept up in the background. Belongs to one event loop."""

    def __init__(self, url: str, name: str, tls: MeshTls | None = None) -> None:
        """`name` is what the server's monitoring shows."""
        self._url = url
        self._tls = tls
        self._name = name
        self._client: Client | None = None
        self._subscriptions: list[tuple[str, Handler]] = []
        self._callbacks: list[Callable[[], None]] = []
        self._pending: deque[tuple[str, bytes, dict[str, str] | None]] = deque()
        self._pending_bytes = 0
        self._wake = asyncio.Event()
        self._sent = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._metrics = metrics.bus(telemetry.role())
        self._reported_down = False

    @classmethod
    def of(cls, config: Config, name: str) -> Bus:
        """The configuration's."""
        return cls(config.nats.effective_url(), name, MeshTls.of(config.bus_tls()))

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.is_connected

    @property
    def client(self) -> Client | None:
        """The library's connected client, for JetStream; None while disconnected."""
        return self._client if self.connected else None

    async def start(self) -> None:
        """Begin connecting; returns at once."""
        self._tasks = [
            asyncio.create_task(self._stay_connected(), name="bus-connection"),
            asyncio.create_task(self._send(), name="bus-sender"),
        ]

    def publish(self, subject: str, payload: bytes, headers: dict[str, str] | None = None) -> None:
        """Send soon, in order; dropped and counted while disconnected. Never blocks or raises.

        The running span goes along as header `traceparent`, for the receiving handler.
        NATS refuses payloads over its `max_payload`, 1 MiB by default; they are dropped, too.
        """
        if not self.connected or self._pending_bytes + len(payload) > MAX_PENDING_BYTES:
            self._metrics.dropped.inc()
            return
        context = trace.CURRENT.get()
        if context is not None:
            headers = {**(headers or {}), trace.TRACEPARENT: str(context)}
        self._pending.append((subject, payload, headers))
        self._pending_bytes += len(payload)
        self._wake.set()
        self._sent.clear()

    async def subscribe(self, subject: str, handler: Handler) -> None:
        """Call `handler(subject, payload)` for every message from now on, over all reconnections.

        Handlers run one at a time on the event loop, in the sender's trace; one that raises is logged and
        called again.
        """
        self._subscriptions.append((subject, handler))
        if self._client is not None and not self._client.is_closed:
            await self._subscribe(self._client, subject, handler)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call `callback` each time a connection has been made from now on, the first included.

        Messages may have been lost before it, and the server may have forgotten everything.
        """
        self._callbacks.append(callback)

    async def close(self) -> None:
        """Send what is pending if connected, then disconnect. Idempotent."""
        if self.connected and self._pending:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._sent.wait()
        tasks, self._tasks = self._tasks, []
        await cancel(*tasks)
        self._metrics.connected.set(0)

    async def _stay_connected(self) -> None:
        # nats-py reconnects by itself; a new client is needed only after errors it treats as final,
        # such as a refused authorization.
        while True:
            closed = asyncio.Event()
            client = Client()
            try:
                await self._connect(client, closed)
                await closed.wait()
                log.warning("bus connection ended for good, starting over", url=self._url)
            finally:
                self._client = None
                with contextlib.suppress(NatsError, OSError, TimeoutError):
                    await client.close()
            await asyncio.sleep(RECONNECT_WAIT_S)

    async def _connect(self, client: Client, closed: asyncio.Event) -> None:
        async def on_error(error: Exception) -> None:
            self._metrics.errors.inc()
            self._refresh_certificate()
            if client.is_connected:
                log.warning("bus error", error=str(error) or type(error).__name__)
            elif not self._reported_down:
                self._reported_down = True
                log.warning("bus is not reachable, trying on", url=self._url, error=str(error))

        async def on_disconnect() -> None:
            self._metrics.connected.set(0)
            self._refresh_certificate()
            self._drop_pending()
            log.warning("bus disconnected", url=self._url)

        async def on_reconnect() -> None:
            self._made()

        async def on_close() -> None:
            closed.set()

        await client.connect(
            servers=[self._url],
            name=self._name,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_WAIT_S,  # pyright: ignore[reportArgumentType] - int in the stub only
            # A server that hangs without closing is given up after two unanswered pings.
            ping_interval=2,
            max_outstanding_pings=2,
            error_cb=on_error,
            disconnected_cb=on_disconnect,
            reconnected_cb=on_reconnect,
            closed_cb=on_close,
            **bus_security(self._tls),
        )
        self._client = client
        for subject, handler in self._subscriptions:
            await self._subscribe(client, subject, handler)
        # The server has seen the subscriptions before anyone acts on being connected.
        await client.flush()
        self._made()

    def _refresh_certificate(self) -> None:
        """Before another attempt: the library keeps the context, whose content may be replaced."""
        if self._tls is not None:
            self._tls.refresh()

    def _made(self) -> None:
        self._reported_down = False
        self._metrics.connected.set(1)
        self._metrics.connects.inc()
        log.info("bus connected", url=self._url)
        for callback in self._callbacks:
            try:
                callback()
            except Exception:
                log.exception("bus callback failed")

    async def _subscribe(self, client: Client, subject: str, handler: Handler) -> None:
        async def deliver(message: Msg) -> None:
            self._metrics.received.inc()
            sender = (message.headers or {}).get(trace.TRACEPARENT, "")
            trace.CURRENT.set(trace.parse(sender))
            try:
                handler(message.subject, message.data)
            except Exception:
                log.exception("bus handler failed", subject=message.subject)

        await client.subscribe(
            subject,
            cb=deliver,
            pending_msgs_limit=MAX_UNREAD_MESSAGES,
            pending_bytes_limit=MAX_UNREAD_BYTES,
        )

    async def _send(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                subject, payload, headers = self._pending.popleft()
                self._pending_bytes -= len(payload)
                client = self.client
                try:
                    if client is None:
                        raise ConnectionError("disconnected")
                    await client.publish(subject, payload, headers=headers)
                    self._metrics.published.inc()
                except (NatsError, OSError, TimeoutError) as error:
                    self._metrics.dropped.inc()
                    log.warning("bus message dropped", subject=subject, bytes=len(payload), error=str(error))
            self._sent.set()

    def _drop_pending(self) -> None:
        self._metrics.dropped.inc(len(self._pending))
        self._pending.clear()
        self._pending_bytes = 0
