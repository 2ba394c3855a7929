"""The halves of a split request on mock engines: those that meet late, never, or part early."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from fixtures.waiting import eventually
from kvmesh.common.config import load_config
from kvmesh.engine.contract import Bootstrap, EngineRequest, FinishReason, Role, Sampling, StepOutput
from kvmesh.engine.mock import MockEngine
from kvmesh.v1.errors_pb2 import ErrorCode

# Model milliseconds are real ones; a block takes 8 ms to move.
MOCK = {"block_bytes": 8 << 20, "transfer_gib_s": 1.0, "bootstrap_timeout_s": 0.3, "total_blocks": 512}


@pytest.fixture
async def engines() -> AsyncIterator[dict[Role, MockEngine]]:
    config = load_config(overrides={"engine": {"kind": "mock", "mock": MOCK}})
    engines = {
        role: MockEngine(config, role, model_path="", worker_id=role) for role in (Role.PREFILL, Role.DECODE)
    }
    try:
        yield engines
    finally:
        for engine in engines.values():
            await engine.close()


@pytest.fixture
async def port(engines: dict[Role, MockEngine]) -> int:
    infos = [await engine.start() for engine in engines.values()]
    return infos[0].bootstrap_port


def request(port: int, room: int | None = None, length: int = 160) -> EngineRequest:
    chance = random.Random(length)
    return EngineRequest(
        "r",
        [chance.randrange(1_000) for _ in range(length)],
        Sampling(temperature=0.0, max_new_tokens=500, ignore_eos=True),
        Bootstrap("127.0.0.1", port, room if room is not None else random.getrandbits(63)),
    )


def idle(engines: dict[Role, MockEngine]) -> bool:
    loads = [engine.load() for engine in engines.values()]
    return not any(
        load.requests or load.queued_requests or load.blocks_used or load.transfers for load in loads
    )


def ended(outputs: list[StepOutput]) -> bool:
    return bool(outputs) and outputs[-1].finish is not None


def error_code(outputs: list[StepOutput]) -> ErrorCode:
    finish = outputs[-1].finish
    assert finish is not None
    assert finish.reason is FinishReason.ERROR
    assert finish.error is not None
    return finish.error.code


@pytest.mark.parametrize("first", [Role.PREFILL, Role.DECODE])
async def test_either_may_come_first(engines: dict[Role, MockEngine], port: int, first: Role) -> None:
    meeting = request(port)
    results: dict[Role, list[StepOutput]] = {Role.PREFILL: [], Role.DECODE: []}
    second = Role.DECODE if first is Role.PREFILL else Role.PREFILL
    engines[first].submit(meeting, results[first].extend)
    await asyncio.sleep(0.1)
    began = asyncio.get_running_loop().time()
    engines[second].submit(meeting, results[second].extend)
    await eventually(lambda: len(results[Role.DECODE]) > 1)
    # Ten blocks of 8 ms.
    assert asyncio.get_running_loop().time() - began > 0.08
    assert ended(results[Role.PREFILL])
    timing = results[Role.PREFILL][-1].timing
    assert timing is not None
    assert timing.transfer_bytes == 10 * MOCK["block_bytes"]
    assert timing.transfer_ms >= 75


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_who_waits_in_vain_gives_up(engines: dict[Role, MockEngine], port: int, role: Role) -> None:
    outputs: list[StepOutput] = []
    engines[role].submit(request(port), outputs.extend)
    await eventually(lambda: ended(outputs), 2)
    assert error_code(outputs) == ErrorCode.ERROR_CODE_WORKER_LOST
    assert idle(engines)


async def test_nobody_at_the_address(engines: dict[Role, MockEngine], port: int) -> None:
    outputs: list[StepOutput] = []
    engines[Role.DECODE].submit(request(1), outputs.extend)
    await eventually(lambda: ended(outputs), 2)
    assert error_code(outputs) == ErrorCode.ERROR_CODE_WORKER_LOST
    assert idle(engines)


@pytest.mark.parametrize("who", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("delay", [0.0, 0.005, 0.05])
async def test_one_who_leaves_frees_the_other(
    engines: dict[Role, MockEngine], port: int, who: Role, delay: float
) -> None:
    meeting = request(port)
    results: dict[Role, list[StepOutput]] = {Role.PREFILL: [], Role.DECODE: []}
    handles = {role: engines[role].submit(meeting, results[role].extend) for role in results}
    await asyncio.sleep(delay)
    engines[who].abort(handles[who])
    await eventually(lambda: all(ended(outputs) for outputs in results.values()), 2)
    finish = results[who][-1].finish
    assert finish is not None
    assert finish.reason is FinishReason.CANCELLED
    other = Role.DECODE if who is Role.PREFILL else Role.PREFILL
    assert error_code(results[other]) == ErrorCode.ERROR_CODE_WORKER_LOST
    assert idle(engines)


async def test_an_engine_that_stops_frees_the_other(engines: dict[Role, MockEngine], port: int) -> None:
    outputs: list[StepOutput] = []
    meeting = request(port, length=1_600)
    engines[Role.PREFILL].submit(meeting, lambda _: None)
    engines[Role.DECODE].submit(meeting, outputs.extend)
    await asyncio.sleep(0.1)
    assert not ended(outputs)
    await engines[Role.PREFILL].close()
    await eventually(lambda: ended(outputs), 2)
    assert error_code(outputs) == ErrorCode.ERROR_CODE_WORKER_LOST
    assert idle(engines)


async def test_a_prefix_decode_has_is_not_moved_again(engines: dict[Role, MockEngine], port: int) -> None:
    results: list[list[StepOutput]] = []
    for _ in range(2):
        meeting = request(port)
        meeting = EngineRequest("r", meeting.token_ids, Sampling(0.0, max_new_tokens=2), meeting.bootstrap)
        prefill: list[StepOutput] = []
        decode: list[StepOutput] = []
        engines[Role.PREFILL].submit(meeting, prefill.extend)
        engines[Role.DECODE].submit(meeting, decode.extend)
        await eventually(lambda outputs=decode: ended(outputs))
        results.append(prefill)
    moved = [outputs[-1].timing.transfer_bytes for outputs in results if outputs[-1].timing]
    assert moved == [10 * MOCK["block_bytes"], 1 * MOCK["block_bytes"]]


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n", b"{}\n", b"x" * 10_000, b'{"room": 1'])
async def test_noise_at_the_door_is_turned_away(
    engines: dict[Role, MockEngine], port: int, noise: bytes
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(noise)
    assert await asyncio.wait_for(reader.read(), 2) == b""
    writer.close()
    assert idle(engines)
