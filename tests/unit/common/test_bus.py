"""The bus against a real NATS server that comes late, dies, hangs and returns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from fixtures.nats import NatsServer
from fixtures.waiting import eventually
from kvmesh.common import bus as bus_module
from kvmesh.common import telemetry
from kvmesh.common.bus import Bus


@pytest.fixture
async def bus(nats_down: NatsServer) -> AsyncIterator[Bus]:
    """A started bus whose server is not there yet."""
    bus = Bus(nats_down.url, "test")
    await bus.start()
    yield bus
    await bus.close()


class Inbox(list[tuple[str, bytes]]):
    def __call__(self, subject: str, payload: bytes) -> None:
        self.append((subject, payload))


async def test_a_server_that_comes_late(bus: Bus, nats_down: NatsServer) -> None:
    inbox, connections = Inbox(), []
    bus.on_reconnect(lambda: connections.append(bus.connected))
    await bus.subscribe("a.*", inbox)
    bus.publish("a.b", b"lost")
    await asyncio.sleep(0.3)
    assert not bus.connected
    assert not connections
    nats_down.start()
    await eventually(lambda: bus.connected)
    await eventually(lambda: connections == [True])
    bus.publish("a.b", b"1")
    bus.publish("other", b"2")
    bus.publish("a.c", b"3")
    await eventually(lambda: len(inbox) == 2)
    assert inbox == [("a.b", b"1"), ("a.c", b"3")]


async def test_subscriptions_survive_a_server_that_forgot_everything(bus: Bus, nats_down: NatsServer) -> None:
    inbox, connections = Inbox(), []
    bus.on_reconnect(lambda: connections.append(True))
    nats_down.start()
    await eventually(lambda: bus.connected)
    await bus.subscribe("a", inbox)
    for number in range(3):
        bus.publish("a", str(number).encode())
        await eventually(lambda n=number: len(inbox) == n + 1)
        nats_down.stop(empty=True)
        await eventually(lambda: not bus.connected)
        bus.publish("a", b"dropped")
        nats_down.start()
        await eventually(lambda: bus.connected)
    await eventually(lambda: len(connections) == 4)
    bus.publish("a", b"last")
    await eventually(lambda: len(inbox) == 4)
    assert [payload for _, payload in inbox] == [b"0", b"1", b"2", b"last"]


async def test_order_is_kept(bus: Bus, nats_down: NatsServer) -> None:
    inbox = Inbox()
    await bus.subscribe("a", inbox)
    nats_down.start()
    await eventually(lambda: bus.connected)
    for number in range(5000):
        bus.publish("a", number.to_bytes(4, "big"))
    await eventually(lambda: len(inbox) == 5000)
    assert [int.from_bytes(payload, "big") for _, payload in inbox] == list(range(5000))


async def test_a_handler_that_raises_is_called_again(bus: Bus, nats_down: NatsServer) -> None:
    seen: list[bytes] = []

    def handler(subject: str, payload: bytes) -> None:
        seen.append(payload)
        raise ValueError("no")

    await bus.subscribe("a", handler)
    nats_down.start()
    await eventually(lambda: bus.connected)
    bus.publish("a", b"1")
    bus.publish("a", b"2")
    await eventually(lambda: seen == [b"1", b"2"])


async def test_headers_travel(bus: Bus, nats_down: NatsServer) -> None:
    nats_down.start()
    await eventually(lambda: bus.connected)
    assert bus.client is not None
    subscription = await bus.client.subscribe("a")
    bus.publish("a", b"x", {"traceparent": "00-1-2-01"})
    message = await subscription.next_msg(timeout=5)
    assert message.headers == {"traceparent": "00-1-2-01"}


async def test_the_senders_trace_reaches_the_handler(bus: Bus, nats_down: NatsServer) -> None:
    traces: list[str] = []
    await bus.subscribe("a", lambda subject, payload: traces.append(telemetry.current_traceparent()))
    nats_down.start()
    await eventually(lambda: bus.connected)
    with telemetry.span("work"):
        mine = telemetry.current_traceparent()
        bus.publish("a", b"1")
    bus.publish("a", b"2")
    await eventually(lambda: len(traces) == 2)
    assert traces == [mine, ""]


async def test_publishing_is_bounded(
    bus: Bus, nats_down: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_module, "MAX_PENDING_BYTES", 10_000)
    inbox = Inbox()
    await bus.subscribe("a", inbox)
    nats_down.start()
    await eventually(lambda: bus.connected)
    for _ in range(100):
        bus.publish("a", bytes(1000))
    await eventually(lambda: len(inbox) == 10)
    await asyncio.sleep(0.1)
    assert len(inbox) == 10


async def test_a_payload_nats_refuses_is_dropped(bus: Bus, nats_down: NatsServer) -> None:
    inbox = Inbox()
    await bus.subscribe("a", inbox)
    nats_down.start()
    await eventually(lambda: bus.connected)
    bus.publish("a", bytes(2 << 20))
    bus.publish("a", b"small")
    await eventually(lambda: [payload for _, payload in inbox] == [b"small"])
    assert bus.connected


async def test_a_hanging_server_is_given_up_and_found_again(bus: Bus, nats_down: NatsServer) -> None:
    nats_down.start()
    await eventually(lambda: bus.connected)
    nats_down.hang()
    await eventually(lambda: not bus.connected, timeout=15)
    nats_down.resume()
    await eventually(lambda: bus.connected)


async def test_close_sends_what_is_pending(nats: NatsServer) -> None:
    inbox = Inbox()
    reader, writer = Bus(nats.url, "reader"), Bus(nats.url, "writer")
    await reader.subscribe("a", inbox)
    await reader.start()
    await writer.start()
    await eventually(lambda: reader.connected and writer.connected)
    for _ in range(100):
        writer.publish("a", b"x")
    await writer.close()
    await writer.close()
    await eventually(lambda: len(inbox) == 100)
    await reader.close()
