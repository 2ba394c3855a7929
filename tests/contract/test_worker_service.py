"""The worker processes as their callers see them: real gRPC, real NATS, the mock engine."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import grpc
import psutil
import pytest
import yaml

from fixtures.nats import NatsServer
from fixtures.workers import EOF, Stream, Worker, prompt, running, start
from kvmesh.common.bus import Bus
from kvmesh.common.errors import KvmeshError
from kvmesh.common.events.publication import subject
from kvmesh.common.grpc.client import Channels
from kvmesh.core import hash_tokens
from kvmesh.v1.common_pb2 import Role, WorkerState
from kvmesh.v1.engine_pb2 import (
    Bootstrap,
    EngineRequest,
    FinishReason,
    FlushCacheRequest,
    GenerateRequest,
)
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.events_pb2 import KvEventBatch, SnapshotRequest

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
async def channels() -> AsyncIterator[Channels]:
    channels = Channels()
    yield channels
    await channels.close()


@pytest.fixture
async def aggregated(tmp_path: Path, nats_server: NatsServer, channels: Channels) -> AsyncIterator[Worker]:
    async with running("aggregated", tmp_path, nats_server.url, channels) as worker:
        yield worker


@pytest.fixture
async def pair(
    tmp_path: Path, nats_server: NatsServer, channels: Channels
) -> AsyncIterator[tuple[Worker, Worker]]:
    async with (
        running("prefill", tmp_path, nats_server.url, channels) as prefill,
        running("decode", tmp_path, nats_server.url, channels) as decode,
    ):
        yield prefill, decode


async def alone(worker: Worker, tokens: Sequence[int], max_new_tokens: int = 16) -> list[int]:
    """The answer to one prompt, on a stream of its own that is half-closed at once."""
    stream = Stream.generate(worker)
    await stream.start(start(1, tokens, max_new_tokens))
    await stream.call.done_writing()
    await stream.finish()
    assert await stream.call.read() is EOF
    return stream.tokens(1)


async def test_registration_says_what_the_worker_is(
    pair: tuple[Worker, Worker], nats_server: NatsServer
) -> None:
    prefill, decode = [await worker.info() for worker in pair]
    assert (prefill.role, decode.role) == (Role.ROLE_PREFILL, Role.ROLE_DECODE)
    assert (prefill.id, prefill.engine, prefill.pid) == ("prefill-0", "mock", pair[0].process.pid)
    assert prefill.incarnation != decode.incarnation
    assert prefill.address == f"127.0.0.1:{pair[0].port}"
    assert (prefill.bootstrap.host, decode.bootstrap.port) == ("127.0.0.1", 0)
    assert prefill.bootstrap.port
    assert prefill.kv.page_size == 16
    assert prefill.kv.total_blocks
    assert os.path.isfile(os.path.join(prefill.model.path, "tokenizer.json"))  # noqa: ASYNC240
    assert list(prefill.model.eos_token_ids) == [2]
    assert list(prefill.model.aliases) == ["default"]
    assert (await pair[1].gauge("kvmesh_decode_blocks_total")) == decode.kv.total_blocks


async def test_a_step_of_all_requests_is_one_message(aggregated: Worker) -> None:
    expected = [await alone(aggregated, prompt(seed), 64) for seed in range(8)]
    stream = Stream.generate(aggregated)
    for seed in range(8):
        await stream.start(start(seed, prompt(seed), 64))
    await stream.finish()
    assert [stream.tokens(seed) for seed in range(8)] == expected
    # 64 steps, and the first few before all have been admitted.
    assert 64 <= stream.messages <= 64 + 8
    first, last = stream.steps[0][0], stream.steps[0][-1]
    assert first.HasField("cached")
    assert first.cached.device == 32
    assert last.timing.prefill_ms > 0
    assert not any(step.HasField("cached") or step.HasField("finish") for step in stream.steps[0][1:-1])
    stream.call.cancel()
    await aggregated.idle()


async def test_split_request_through_both_workers(pair: tuple[Worker, Worker]) -> None:
    prefill, decode = pair
    meeting = (await prefill.info()).bootstrap
    streams = Stream.prefill(prefill), Stream.generate(decode)
    for number in range(4):
        room = Bootstrap(host=meeting.host, port=meeting.port, room=random.getrandbits(63))
        for stream in streams:
            await stream.start(start(number, prompt(number, 100), 8, room))
    await asyncio.gather(*(stream.finish() for stream in streams))
    for number in range(4):
        assert len(streams[1].tokens(number)) == 8
        assert streams[0].tokens(number) == streams[1].tokens(number)[:1]
        assert streams[0].steps[number][-1].timing.transfer_bytes == 7 * (await prefill.info()).kv.block_bytes
    for stream in streams:
        stream.call.cancel()
    await prefill.idle()
    await decode.idle()


async def test_bad_requests_fail_alone(aggregated: Worker) -> None:
    stream = Stream.generate(aggregated)
    await stream.start(start(1, prompt(1), 50))
    await stream.start(start(2, []))
    await stream.start(start(3, [1 << 20]))
    await stream.start(start(4, prompt(4, 9_000)))
    await stream.start(start(5, prompt(5), bootstrap=Bootstrap(host="127.0.0.1", port=1, room=1)))
    await stream.cancel(77)
    await stream.call.write(GenerateRequest())
    await stream.finish()
    assert len(stream.tokens(1)) == 50
    assert stream.error(2) == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    assert stream.error(3) == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    assert stream.error(4) == ErrorCode.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED
    assert stream.error(5) == ErrorCode.ERROR_CODE_WRONG_ROLE
    stream.call.cancel()
    await aggregated.idle()


async def test_an_id_used_twice_ends_with_an_error(aggregated: Worker) -> None:
    stream = Stream.generate(aggregated)
    await stream.start(start(1, prompt(1), 5_000))
    await stream.read()
    await stream.call.write(GenerateRequest(start=start(1, prompt(2))))
    await stream.finish()
    assert stream.error(1) == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    await stream.start(start(3, prompt(3), 4))
    await stream.finish()
    assert len(stream.tokens(3)) == 4
    stream.call.cancel()


async def test_cancel_and_deadline_end_one_request(aggregated: Worker) -> None:
    stream = Stream.generate(aggregated)
    await stream.start(start(1, prompt(1), 5_000))
    await stream.start(start(2, prompt(2), 5_000, timeout_ms=300))
    await stream.start(start(3, prompt(3), 100, timeout_ms=30_000))
    await stream.read()
    await stream.cancel(1)
    await stream.finish()
    assert stream.reason(1) == FinishReason.FINISH_REASON_CANCELLED
    assert stream.error(2) == ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED
    assert stream.reason(3) == FinishReason.FINISH_REASON_LENGTH
    stream.call.cancel()
    await aggregated.idle()


async def test_calls_for_another_role_are_refused(pair: tuple[Worker, Worker], aggregated: Worker) -> None:
    prefill, decode = pair
    calls = [prefill.decode.Generate(), decode.prefill.Prefill(), aggregated.prefill.Prefill()]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        error = KvmeshError.from_rpc(caught.value, "worker")
        assert error.code == ErrorCode.ERROR_CODE_WRONG_ROLE
        assert error.retryable


async def test_random_disconnects_leak_nothing(pair: tuple[Worker, Worker]) -> None:
    prefill, decode = pair
    meeting = (await prefill.info()).bootstrap
    chance = random.Random(11)

    async def half(stream: Stream, request: EngineRequest, patience: float) -> None:
        await stream.start(request)
        try:
            async with asyncio.timeout(patience):
                await stream.finish()
        except TimeoutError:
            pass
        stream.call.cancel()

    async def one(number: int) -> None:
        await asyncio.sleep(chance.random() * 2)
        room = Bootstrap(host=meeting.host, port=meeting.port, room=random.getrandbits(63))
        request = start(number, prompt(number, chance.randint(1, 1_500)), 2_000, room)
        # Some leave both halves at once, some one after the other, and some never start one of them.
        halves = chance.choice([[prefill], [decode], [prefill, decode], [decode, prefill], [prefill, decode]])
        streams = [
            Stream.prefill(worker) if worker is prefill else Stream.generate(worker) for worker in halves
        ]
        await asyncio.gather(*(half(stream, request, chance.random() * 0.4) for stream in streams))

    async def measured() -> tuple[int, int]:
        await prefill.idle(5)
        await decode.idle(5)
        return tuple(psutil.Process(worker.process.pid).memory_info().rss for worker in pair)  # pyright: ignore[reportReturnType]

    await asyncio.gather(*(one(number) for number in range(50)))
    before = await measured()
    await asyncio.gather(*(one(number) for number in range(50, 250)))
    after = await measured()
    for worker, old, new in zip(pair, before, after, strict=True):
        assert await worker.gauge(f"kvmesh_{worker.id[:-2]}_streams") == 0
        assert new - old < 16 << 20
        assert not worker.logged("rpc failed")
    # Both still work together.
    room = Bootstrap(host=meeting.host, port=meeting.port, room=5)
    streams = Stream.prefill(prefill), Stream.generate(decode)
    for stream in streams:
        await stream.start(start(1, prompt(1), 4, room))
    await asyncio.gather(*(stream.finish() for stream in streams))
    assert len(streams[1].tokens(1)) == 4
    for stream in streams:
        stream.call.cancel()


async def test_a_caller_that_dies_leaves_nothing(aggregated: Worker) -> None:
    code = (
        "import grpc, time\n"
        "from kvmesh.v1.engine_pb2 import *\nfrom kvmesh.v1.engine_pb2_grpc import DecodeServiceStub\n"
        f"stub = DecodeServiceStub(grpc.insecure_channel('127.0.0.1:{aggregated.port}'))\n"
        "def commands():\n"
        "    for n in range(20):\n"
        "        sampling = SamplingParams(ignore_eos=True)\n"
        "        yield GenerateRequest(start=EngineRequest(id=n, token_ids=[9] * 50, sampling=sampling))\n"
        "    time.sleep(60)\n"
        "for message in stub.Generate(commands()):\n"
        "    print(len(message.steps), flush=True)\n"
    )
    caller = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert caller.stdout is not None
    assert await caller.stdout.readline()
    assert (await aggregated.info()).load.requests > 0
    caller.kill()
    await aggregated.idle()
    await caller.communicate()


async def test_events_on_the_bus_and_snapshots_agree(aggregated: Worker, nats_server: NatsServer) -> None:
    bus = Bus(nats_server.url, "reader")
    batches: list[KvEventBatch] = []
    await bus.subscribe(
        subject("*"), lambda _, payload, to=batches: to.append(KvEventBatch.FromString(payload))
    )
    connected = asyncio.Event()
    bus.on_reconnect(connected.set)
    await bus.start()
    try:
        await asyncio.wait_for(connected.wait(), 5)
        first, blocks = await aggregated.snapshot()
        assert not blocks
        for seed in range(5):
            await alone(aggregated, prompt(seed, 64), 20)
        last, blocks = await aggregated.snapshot()
        for _ in range(100):
            if batches and batches[-1].sequence >= last:
                break
            await asyncio.sleep(0.02)
        batches = [batch for batch in batches if first < batch.sequence <= last]
        assert [batch.sequence for batch in batches] == list(range(first + 1, last + 1))
        assert {batch.incarnation for batch in batches} == {(await aggregated.info()).incarnation}
        assert all(batch.traceparent and batch.holder_id == aggregated.id and batch.node for batch in batches)
        assert {h for batch in batches for h in batch.hashes} == blocks
        assert batches[-1].digests[0].count == len(blocks)
        assert set(hash_tokens(prompt(0, 64), 16).tolist()) <= blocks
        await aggregated.workers.FlushCache(FlushCacheRequest())
        assert (await aggregated.snapshot())[1] == set()
        assert (await aggregated.info()).load.blocks_cached == 0
    finally:
        await bus.close()


async def test_snapshot_of_another_holder_is_refused(aggregated: Worker) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await aggregated.events.Snapshot(SnapshotRequest(holder_id="other")).read()
    assert KvmeshError.from_rpc(caught.value, "worker").code == ErrorCode.ERROR_CODE_NOT_FOUND


async def test_nats_down_at_the_start_back_and_away_again(
    tmp_path: Path, nats_down: NatsServer, channels: Channels
) -> None:
    async with running("aggregated", tmp_path, nats_down.url, channels) as worker:
        assert len(await alone(worker, prompt(1, 64))) == 16
        nats_down.start()
        bus = Bus(nats_down.url, "reader")
        batches: list[KvEventBatch] = []
        await bus.subscribe(subject(worker.id), lambda _, data: batches.append(KvEventBatch.FromString(data)))
        await bus.start()
        try:
            # A reader learns by number what it missed: from the announcement, or from the next batch.
            for seed in range(2, 100):
                await alone(worker, prompt(seed, 64))
                if batches:
                    break
                await asyncio.sleep(0.1)
            sequence, blocks = await worker.snapshot()
            assert batches
            assert 1 < batches[-1].sequence <= sequence
            assert set(hash_tokens(prompt(1, 64), 16).tolist()) <= blocks
            nats_down.stop()
            assert len(await alone(worker, prompt(200, 64))) == 16
            missed = (await worker.snapshot())[0]
            seen = len(batches)
            nats_down.start()
            for _ in range(100):
                if len(batches) > seen:
                    break
                await asyncio.sleep(0.1)
            # Announced without any new event, so that the reader sees the gap.
            assert batches[seen].sequence > missed
            assert not batches[seen].ops
        finally:
            await bus.close()


async def test_sigterm_drains(aggregated: Worker) -> None:
    stream = Stream.generate(aggregated)
    await stream.start(start(1, prompt(1), 200))
    await stream.read()
    aggregated.process.send_signal(signal.SIGTERM)
    await aggregated.become(WorkerState.WORKER_STATE_DRAINING)
    await stream.start(start(2, prompt(2)))
    await stream.finish()
    assert len(stream.tokens(1)) == 200
    assert stream.reason(1) == FinishReason.FINISH_REASON_LENGTH
    assert stream.error(2) == ErrorCode.ERROR_CODE_UNAVAILABLE
    assert await stream.call.read() is EOF
    assert await aggregated.exit_code() == 0


async def test_a_drain_does_not_wait_for_ever(
    tmp_path: Path, nats_server: NatsServer, channels: Channels
) -> None:
    async with running("aggregated", tmp_path, nats_server.url, channels, workers={"drain_s": 0.3}) as worker:
        stream = Stream.generate(worker)
        await stream.start(start(1, prompt(1), 8_000))
        await stream.read()
        worker.process.send_signal(signal.SIGTERM)
        await stream.finish()
        assert stream.error(1) == ErrorCode.ERROR_CODE_UNAVAILABLE
        assert stream.steps[1][-1].finish.error.retryable
        assert await worker.exit_code() == 0


async def test_an_open_stream_of_no_requests_does_not_hold_up_the_drain(aggregated: Worker) -> None:
    stream = Stream.generate(aggregated)
    await stream.start(start(1, prompt(1), 4))
    await stream.finish()
    aggregated.process.send_signal(signal.SIGTERM)
    assert await aggregated.exit_code(5) == 0


@pytest.mark.parametrize("key", ["port", "metrics_port", "bootstrap_port"])
async def test_a_taken_port_is_named(
    tmp_path: Path, nats_server: NatsServer, channels: Channels, key: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = tmp_path / "config.yaml"
        file.write_text(
            yaml.safe_dump(
                {"engine": {"kind": "mock"}, "nats": {"url": nats_server.url}, "worker": {key: port}}
            )
        )
        run = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "kvmesh.prefill", "--config", str(file)],
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert run.returncode == 1
    assert f"worker.{key}" in run.stderr.splitlines()[-1]
    assert str(port) in run.stderr.splitlines()[-1]


async def test_an_unusable_id_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"engine": {"kind": "mock"}, "worker": {"id": "a.b"}}))
    run = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "kvmesh.decode", "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert run.returncode == 1
    assert "worker.id" in run.stderr
