"""A worker's process in this one: an engine that cannot start, one that dies, and what others see of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fixtures.nats import NatsServer
from fixtures.waiting import eventually
from kvmesh.common.bus import Bus
from kvmesh.common.config import Config, load_config
from kvmesh.common.discovery import make_discovery
from kvmesh.common.errors import KvmeshError
from kvmesh.common.grpc.client import Channels
from kvmesh.decode.service import add_service
from kvmesh.engine.contract import EngineInfo, Role
from kvmesh.engine.mock import MockEngine
from kvmesh.engine.worker import WorkerProcess, process
from kvmesh.engine.worker.registration import worker_id
from kvmesh.v1.common_pb2 import WorkerState
from kvmesh.v1.engine_pb2 import EngineRequest, GenerateRequest, SamplingParams
from kvmesh.v1.engine_pb2_grpc import DecodeServiceStub
from kvmesh.v1.errors_pb2 import ErrorCode


def configuration(nats: NatsServer, home: Path) -> Config:
    return load_config(
        overrides={
            "engine": {"kind": "mock"},
            "nats": {"url": nats.url},
            "discovery": {"heartbeat_s": 0.1},
            "worker": {"id": "w-0"},
            "home": str(home),
        }
    )


class Mortal(MockEngine):
    """Dies in its next step once told to."""

    def die(self) -> None:
        def broken() -> None:
            raise RuntimeError("out of memory")

        self._scheduler.next_step = broken  # pyright: ignore[reportAttributeAccessIssue]
        self._wake.set()


async def test_an_engine_that_dies_ends_the_process(
    nats: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Mortal] = []

    def make(config: Config, role: Role, **arguments: Any) -> Mortal:
        made.append(Mortal(config, role, **arguments))
        return made[-1]

    monkeypatch.setattr(process, "make_engine", make)
    config = configuration(nats, tmp_path)
    bus, channels = Bus(config.nats.effective_url(), "reader"), Channels()
    discovery = make_discovery(config, bus)
    await bus.start()
    await discovery.start()
    running = asyncio.create_task(WorkerProcess(config, Role.AGGREGATED, add_service).run())
    try:
        await eventually(lambda: running.done() or len(discovery.workers()) == 1)
        states: list[int] = []
        discovery.subscribe(lambda: states.extend(w.state for w in discovery.workers().values()))
        await eventually(
            lambda: discovery.workers()["w-0"].state == WorkerState.WORKER_STATE_READY or running.done()
        )
        stream = DecodeServiceStub(channels.get(discovery.workers()["w-0"].address)).Generate()
        sampling = SamplingParams(ignore_eos=True)
        await stream.write(GenerateRequest(start=EngineRequest(id=1, token_ids=[5], sampling=sampling)))
        await stream.read()
        made[0].die()
        step = None
        while step is None or not step.HasField("finish"):
            message = await stream.read()
            (step,) = message.steps
        assert step.finish.error.code == ErrorCode.ERROR_CODE_ENGINE_FAILED
        assert "out of memory" in step.finish.error.message
        with pytest.raises(KvmeshError) as caught:
            await asyncio.wait_for(running, 10)
        assert caught.value.code == ErrorCode.ERROR_CODE_ENGINE_FAILED
        assert "out of memory" in caught.value.message
        await eventually(lambda: not discovery.workers())
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await channels.close()
        await discovery.close()
        await bus.close()


async def test_an_engine_that_cannot_start_ends_the_process(
    nats: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stillborn(MockEngine):
        async def start(self) -> EngineInfo:
            raise KvmeshError(ErrorCode.ERROR_CODE_ENGINE_FAILED, "no memory for the model")

    monkeypatch.setattr(
        process, "make_engine", lambda config, role, **arguments: Stillborn(config, role, **arguments)
    )
    with pytest.raises(KvmeshError, match="no memory for the model"):
        await WorkerProcess(configuration(nats, tmp_path), Role.AGGREGATED, add_service).run()


async def test_a_starting_worker_is_registered_and_refuses(
    nats: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = asyncio.Event()

    class Slow(MockEngine):
        async def start(self) -> EngineInfo:
            await loading.wait()
            return await super().start()

    monkeypatch.setattr(
        process, "make_engine", lambda config, role, **arguments: Slow(config, role, **arguments)
    )
    config = configuration(nats, tmp_path)
    bus, channels = Bus(config.nats.effective_url(), "reader"), Channels()
    discovery = make_discovery(config, bus)
    await bus.start()
    await discovery.start()
    running = asyncio.create_task(WorkerProcess(config, Role.AGGREGATED, add_service).run())
    try:
        await eventually(lambda: "w-0" in discovery.workers())
        worker = discovery.workers()["w-0"]
        assert worker.state == WorkerState.WORKER_STATE_STARTING
        stream = DecodeServiceStub(channels.get(worker.address)).Generate()
        await stream.write(GenerateRequest(start=EngineRequest(id=1, token_ids=[5])))
        refusal = (await stream.read()).steps[0].finish
        assert refusal.error.code == ErrorCode.ERROR_CODE_UNAVAILABLE
        loading.set()
        await eventually(lambda: discovery.workers()["w-0"].state == WorkerState.WORKER_STATE_READY)
        # The stream outlives the refusal.
        sampling = SamplingParams(max_new_tokens=1)
        await stream.write(GenerateRequest(start=EngineRequest(id=2, token_ids=[5], sampling=sampling)))
        assert len((await stream.read()).steps[0].token_ids) == 1
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await channels.close()
        await discovery.close()
        await bus.close()


def test_worker_ids() -> None:
    config = Config()
    assert worker_id(config, Role.DECODE).startswith("decode-")
    config.worker.id = "prefill-0"
    assert worker_id(config, Role.PREFILL) == "prefill-0"
    for bad in ("a.b", "a b", "*", "ä"):
        config.worker.id = bad
        with pytest.raises(KvmeshError, match=r"worker\.id"):
            worker_id(config, Role.PREFILL)
