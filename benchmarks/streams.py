"""What carrying a message a step costs: CPU of both ends, for three ways between two processes.

A worker sends one message an engine step. Here a process sends one of 200 bytes every 6 ms on one stream, and
another takes it: over kvmesh's streams, over grpc's asyncio API, and over a bare TCP connection of asyncio,
which is the least that two event loops can do. All three include the sender's timer.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import grpc.aio

from harness import Cell, Report, cpu_seconds, interleave, main
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.streams import Stream, StreamHub

STEP_S = 0.006
MESSAGE = os.urandom(200)
METHOD = "/kvmesh.bench.Steps/Steps"


async def send_steps(send: Callable[[bytes], object], messages: int) -> None:
    """One message a step, by a clock that does not drift."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    for _ in range(messages):
        send(MESSAGE)
        due += STEP_S
        await asyncio.sleep(due - loop.time())


class Counter:
    """Takes messages; done after the last one. A stream's handler and a protocol's core at once."""

    def __init__(self, messages: int) -> None:
        self._bytes = messages * len(MESSAGE)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_message(self, message: bytes) -> None:
        self._bytes -= len(message)
        if self._bytes <= 0 and not self.done.done():
            self.done.set_result(None)

    def on_half_close(self) -> None: ...

    def on_writable(self) -> None: ...

    def on_closed(self, error: KvmeshError | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("closed early"))


class Sender:
    """The served end of a kvmesh stream: sends its steps once it has been asked."""

    def __init__(self, stream: Stream, messages: int) -> None:
        self._stream = stream
        self._messages = messages
        self._sending: asyncio.Task[None] | None = None

    def on_message(self, message: bytes) -> None:
        self._sending = asyncio.create_task(send_steps(self._stream.send, self._messages))

    def on_half_close(self) -> None: ...

    def on_writable(self) -> None: ...

    def on_closed(self, error: KvmeshError | None) -> None:
        if self._sending is not None:
            self._sending.cancel()


async def serve_kvmesh(messages: int) -> int:
    hub = StreamHub()
    SERVERS.append(hub)
    return hub.serve("127.0.0.1", 0, {METHOD: lambda stream: Sender(stream, messages)}, "/nowhere.sock")


async def take_kvmesh(port: int, messages: int) -> None:
    hub = StreamHub()
    counter = Counter(messages)
    hub.open(f"127.0.0.1:{port}", METHOD, counter).send(b"go")
    await counter.done
    hub.close()


async def serve_grpc(messages: int) -> int:
    async def steps(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        async for _ in requests:
            queue: asyncio.Queue[bytes] = asyncio.Queue()
            sending = asyncio.create_task(send_steps(queue.put_nowait, messages))
            for _ in range(messages):
                await context.write(await queue.get())
            await sending
            return

    service, _, method = METHOD[1:].partition("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(steps)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    SERVERS.append(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return port


async def take_grpc(port: int, messages: int) -> None:
    counter = Counter(messages)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream(METHOD)()
        await call.write(b"go")
        async for message in call:
            counter.on_message(message)
    await counter.done


class Wire(asyncio.Protocol):
    def __init__(self, on_data: Callable[[asyncio.Transport, bytes], object]) -> None:
        self._on_data = on_data
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._on_data(self._transport, data)


async def serve_tcp(messages: int) -> int:
    def begin(transport: asyncio.Transport, _: bytes) -> None:
        SERVERS.append(asyncio.create_task(send_steps(transport.write, messages)))

    server = await asyncio.get_running_loop().create_server(lambda: Wire(begin), "127.0.0.1", 0)
    SERVERS.append(server)
    return int(server.sockets[0].getsockname()[1])


async def take_tcp(port: int, messages: int) -> None:
    counter = Counter(messages)
    make = lambda: Wire(lambda _, data: counter.on_message(data))  # noqa: E731
    transport, _ = await asyncio.get_running_loop().create_connection(make, "127.0.0.1", port)
    transport.write(b"go")
    await counter.done
    transport.close()


WAYS = {
    "kvmesh": (serve_kvmesh, take_kvmesh),
    "grpc.aio": (serve_grpc, take_grpc),
    "TCP": (serve_tcp, take_tcp),
}
# What a serving process must not let go of.
SERVERS: list[object] = []


async def serve(way: str, messages: int) -> None:
    """The sending process: prints its port, and serves until it is killed."""
    print(await WAYS[way][0](messages), flush=True)
    await asyncio.Event().wait()


async def measure(way: str, messages: int) -> dict[str, float]:
    """CPU of both processes while all messages pass, milliseconds a message."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, Path(__file__).name, "--serve", way, str(messages),
        cwd=Path(__file__).parent, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        port = int(await child.stdout.readline())
        await asyncio.sleep(0.5)
        pids = (os.getpid(), child.pid)
        before, began = cpu_seconds(pids), time.perf_counter()
        await WAYS[way][1](port, messages)
        spent, took = cpu_seconds(pids) - before, time.perf_counter() - began
    finally:
        child.kill()
        await child.wait()
    return {"cpu_ms": 1e3 * spent / messages, "step_ms": 1e3 * took / messages}


async def run(report: Report, quick: bool) -> None:
    messages = 500 if quick else 2000
    result = await interleave(
        {way: lambda way=way: measure(way, messages) for way in WAYS}, rounds=2 if quick else 7
    )
    report.add(
        Cell(
            "CPU per message, both ends",
            "ms",
            "lower",
            result["kvmesh"]["cpu_ms"],
            peers={f"grpc.aio {importlib.metadata.version('grpcio')}": result["grpc.aio"]["cpu_ms"]},
            limit=result["TCP"]["cpu_ms"],
            note="limit: a bare TCP connection",
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        asyncio.run(serve(sys.argv[2], int(sys.argv[3])))
    else:
        main(__file__, run)
