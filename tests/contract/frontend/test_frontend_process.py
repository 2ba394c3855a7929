"""The frontend as a process: it starts alone, says which port is taken, and drains when asked to stop."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import grpc.aio
import httpx
import pytest
import yaml

from fixtures.frontend import model_info
from fixtures.frontend_process import FrontendProcess
from fixtures.scripted_worker import ROLE_AGGREGATED, ScriptedWorker
from kvmesh.v1.frontend_pb2 import ChatMessage, ChatRequest
from kvmesh.v1.frontend_pb2_grpc import FrontendServiceStub


async def test_starts_with_nothing_else_running(tmp_path: Path) -> None:
    async with FrontendProcess(tmp_path).running() as frontend:
        assert (await frontend.http.get("/ready")).status_code == 503
        body = {"model": "default", "messages": [{"role": "user", "content": "x"}]}
        response = await frontend.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 503
        assert response.headers["retry-after"]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{frontend.port}") as channel:
            request = ChatRequest(messages=[ChatMessage(role="user", content="x")])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await FrontendServiceStub(channel).Chat(request).read()
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        frontend.process.terminate()
        assert await asyncio.wait_for(frontend.process.wait(), 10) == 0


@pytest.mark.parametrize("key", ["http_port", "port"])
async def test_taken_port_is_named(tmp_path: Path, key: str) -> None:
    frontend = FrontendProcess(tmp_path)
    with socket.socket() as taken:
        port = frontend.http_port if key == "http_port" else frontend.port
        taken.bind(("127.0.0.1", port))
        taken.listen()
        await frontend.start()
        _, stderr = await asyncio.wait_for(frontend.process.communicate(), 40)
    assert frontend.process.returncode == 1
    last = stderr.decode().splitlines()[-1]
    assert str(port) in last
    assert f"frontend.{key}" in last


@pytest.mark.parametrize("drain_s", [20.0, 0.3])
async def test_live_streams_finish_within_the_drain_time(tmp_path: Path, drain_s: float) -> None:
    worker = ScriptedWorker("aggregated-0", ROLE_AGGREGATED, model_info(), lambda _: [260] * 60)
    worker.step_s = 0.03
    await worker.start()
    list_file = tmp_path / "workers.yaml"
    list_file.write_text(yaml.safe_dump({"workers": [f"127.0.0.1:{worker.port}"]}))
    discovery = {"kind": "static", "file": str(list_file), "heartbeat_s": 0.2}
    async with FrontendProcess(
        tmp_path, discovery=discovery, frontend={"drain_s": drain_s}
    ).running() as frontend:
        await frontend.answers("/ready", 200)
        body = {"model": "default", "prompt": "x", "max_tokens": 60, "stream": True}
        text = ""
        async with frontend.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for part in response.aiter_text():
                if not text:
                    frontend.process.terminate()
                text += part
        assert await asyncio.wait_for(frontend.process.wait(), 10) == 0
        if drain_s > 2:
            assert text.count('"text"') == 61
            assert text.endswith("data: [DONE]\n\n")
        else:
            assert "shutting down" in text.split("\n\n")[-2]
            assert not worker.live
        with pytest.raises(httpx.TransportError):
            await frontend.http.get("/health")
    await worker.kill()
