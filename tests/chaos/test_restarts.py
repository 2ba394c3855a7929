"""Processes that die come back, and nothing but the requests in flight on them notices."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import httpx
import pytest

from fixtures.mesh import Mesh, wait_for, wait_until

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def mesh(replicated_mesh: Mesh) -> Mesh:
    return replicated_mesh


def kill_and_wait(mesh: Mesh, process: str, timeout: float = 60) -> None:
    old = mesh.kill(process)

    def back() -> bool:
        entry = next(p for p in mesh.status()["processes"] if p["name"] == process)
        return entry["state"] == "ready" and entry["pid"] not in (old, None)

    wait_for(back, timeout, f"{process} to be back", interval=0.3)
    mesh.wait_ready()


@pytest.mark.parametrize("process", ["nats", "router", "kvbm", "prefill-0", "decode-0", "frontend"])
def test_killed_role_comes_back_and_serves(mesh: Mesh, process: str) -> None:
    answer = mesh.chat("who are you?")["choices"][0]["message"]["content"]
    kill_and_wait(mesh, process)
    assert mesh.chat("who are you?")["choices"][0]["message"]["content"] == answer
    entry = next(p for p in mesh.status()["processes"] if p["name"] == process)
    assert entry["restarts"] >= 1
    assert "signal 9" in entry["last_exit"].lower() or "sigkill" in entry["last_exit"].lower()


@pytest.mark.sglang
@pytest.mark.parametrize("process", ["prefill-0", "decode-0"])
def test_killed_sglang_worker_comes_back_and_serves(split_mesh: Mesh, process: str) -> None:
    question = "What is the capital of France?"
    kill_and_wait(split_mesh, process, timeout=180)
    assert "Paris" in split_mesh.chat(question)["choices"][0]["message"]["content"]


async def test_a_killed_decode_worker_fails_no_request(mock_mesh: Mesh) -> None:
    """Its answers go on at the other one, and say what they would have said."""
    prompts = [f"client {number} says" for number in range(16)]
    begun = asyncio.Event()

    async def ask(http: httpx.AsyncClient, prompt: str) -> tuple[str, list[str]]:
        body = {"model": "default", "prompt": prompt, "max_tokens": 400, "ignore_eos": True, "stream": True}
        text, continued = "", []
        body["kvmesh"] = {"explain": True}
        async with http.stream("POST", f"{mock_mesh.url}/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    text += "".join(choice["text"] for choice in chunk["choices"])
                    continued = chunk.get("kvmesh", {}).get("placement", {}).get("continued_on", continued)
                    begun.set()
        return text, continued

    async with httpx.AsyncClient(timeout=60) as http:
        asking = [asyncio.create_task(ask(http, prompt)) for prompt in prompts]
        await begun.wait()
        await asyncio.to_thread(mock_mesh.kill, "decode-0")
        broken = await asyncio.gather(*asking)
        whole = await asyncio.gather(*(ask(http, prompt) for prompt in prompts))
    assert [text for text, _ in broken] == [text for text, _ in whole]
    assert any(continued == ["decode-1"] for _, continued in broken), "nothing was under way when it died"
    await wait_until(lambda: len(mock_mesh.workers()) == 3, 60, "the killed worker to be back")
    mock_mesh.wait_ready()


async def test_nats_restart_fails_no_request(mesh: Mesh) -> None:
    failures: list[str] = []
    served = 0
    stop = asyncio.Event()

    async def client(number: int) -> None:
        nonlocal served
        """Half of them always have a stream open, which so outlasts the restart."""
        streams = number % 2 == 1
        async with httpx.AsyncClient(timeout=60) as http:
            while not stop.is_set():
                body = {
                    "model": "default",
                    "prompt": f"client {number} says {served}",
                    "max_tokens": 1000 if streams else 8,
                    "stream": streams,
                }
                answer = await http.post(f"{mesh.url}/v1/completions", json=body)
                whole = not streams or answer.text.rstrip().endswith("data: [DONE]")
                if answer.status_code == 200 and whole and '"error"' not in answer.text:
                    served += 1
                else:
                    failures.append(answer.text)

    clients = [asyncio.create_task(client(number)) for number in range(4)]
    await asyncio.sleep(1)
    before = served
    nats = await asyncio.to_thread(mesh.pid, "nats")
    os.kill(nats, signal.SIGKILL)

    def back() -> bool:
        status = mesh.status()
        entry = next(p for p in status["processes"] if p["name"] == "nats")
        return entry["pid"] not in (nats, None) and status["nats"]["connected"]

    await wait_until(back, 40, "NATS to be back")
    await asyncio.sleep(6)  # longer than a membership lease lives
    stop.set()
    await asyncio.gather(*clients)
    assert failures == []
    assert served > before
    assert {worker["state"] for worker in mesh.workers().values()} == {"ready"}
