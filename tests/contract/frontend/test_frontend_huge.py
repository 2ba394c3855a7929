"""Prompts of 10 MiB: clean answers, bounded memory, and nobody else waits for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from fixtures.embedding_worker import VECTORS, EmbeddingWorker
from fixtures.frontend import CONTEXT_LENGTH, make
from fixtures.frontend_process import FrontendProcess
from fixtures.scripted_worker import ROLE_AGGREGATED

MIB = 1 << 20
TEXT = "The quick brown fox jumps. "
# Seconds that a short request, or one of a size that is not worked on at once, may take meanwhile: much less
# than one of the huge ones.
PATIENCE_S = 2.0


def prompts(size: int) -> dict[str, dict[str, Any]]:
    """Path -> body with so many bytes of text."""
    text = TEXT * (size // len(TEXT))
    chat = [{"role": "user", "content": text}]
    return {
        "/v1/chat/completions": {"model": "default", "messages": chat},
        "/v1/completions": {"model": "default", "prompt": text},
        "/v1/responses": {"model": "default", "input": text},
        "/v1/messages": {"model": "default", "max_tokens": 4, "messages": chat},
        "/v1/embeddings": {"model": VECTORS, "input": text},
    }


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[FrontendProcess]:
    workers = [make(ROLE_AGGREGATED, [260] * 4), EmbeddingWorker(1)]
    for worker in workers:
        await worker.start()
    file = tmp_path / "workers.yaml"
    file.write_text(yaml.safe_dump({"workers": [f"127.0.0.1:{worker.port}" for worker in workers]}))
    discovery = {"kind": "static", "file": str(file), "heartbeat_s": 0.2}
    async with FrontendProcess(tmp_path, discovery=discovery).running() as front:
        for model in ("default", VECTORS):
            await front.answers(f"/v1/models/{model}", 200)
        yield front
    for worker in workers:
        await worker.kill()


def peak(front: FrontendProcess) -> int:
    """Bytes of memory that the process has had at most."""
    lines = Path(f"/proc/{front.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def code(path: str, answer: httpx.Response) -> str:
    error = answer.json()["error"]
    assert answer.json().get("type") == ("error" if path == "/v1/messages" else None)
    return error["code"]


async def others(front: FrontendProcess, stop: asyncio.Event) -> list[float]:
    """Seconds that requests of other clients take: short ones, and texts that are tokenized in threads."""
    asked = (
        ("/v1/completions", {"model": "default", "prompt": "x", "max_tokens": 2}),
        ("/v1/tokenize", {"model": "default", "prompt": TEXT * 2_000}),
    )
    took: list[float] = []
    async with httpx.AsyncClient(base_url=front.url, timeout=60) as http:
        while not stop.is_set():
            for path, body in asked:
                start = time.monotonic()
                assert (await http.post(path, json=body)).status_code == 200
                took.append(time.monotonic() - start)
            await asyncio.sleep(0.02)
    return took


async def test_within_the_limit_they_are_too_long_for_the_model(
    front: FrontendProcess, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """What was measured is reported (`--junitxml`)."""
    bodies = prompts(10 * MIB)
    async with httpx.AsyncClient(base_url=front.url, timeout=200) as http:

        async def ask(path: str) -> tuple[str, httpx.Response]:
            return path, await http.post(path, json=bodies[path])

        first, *rest = bodies
        answers = [await ask(first)]
        alone = peak(front)
        stop = asyncio.Event()
        meanwhile = asyncio.create_task(others(front, stop))
        start = time.monotonic()
        answers += await asyncio.gather(*map(ask, rest))
        took = time.monotonic() - start
        stop.set()
    for path, answer in answers:
        assert (answer.status_code, code(path, answer)) == (400, "context_length_exceeded"), answer.text
        if path != "/v1/embeddings":
            assert str(CONTEXT_LENGTH) in answer.text
    waits = await meanwhile
    report = {
        "huge_s": round(took, 1),
        "others": len(waits),
        "others_waited_s": round(max(waits), 2),
        "peak_mib": [alone // MIB, peak(front) // MIB],
    }
    record_testsuite_property("huge prompts", report)
    assert max(waits) < PATIENCE_S
    assert waits, "others were served meanwhile"
    # Bodies that are read and wait; not the memory that the work on each takes.
    assert peak(front) - alone < len(rest) * 64 * MIB


async def test_beyond_the_limit_they_are_refused_unread(front: FrontendProcess) -> None:
    bodies = prompts(17 * MIB)

    async def chunks(content: bytes) -> AsyncIterator[bytes]:
        for at in range(0, len(content), MIB):
            yield content[at : at + MIB]

    before = peak(front)
    async with httpx.AsyncClient(base_url=front.url, timeout=60) as http:
        for path, body in bodies.items():
            content = http.build_request("POST", path, json=body).content
            # With the length said beforehand, and without.
            for sent in (content, chunks(content)):
                answer = await http.post(path, content=sent)
                assert (answer.status_code, code(path, answer)) == (413, "payload_too_large")
    assert (await front.http.get("/v1/models")).status_code == 200
    assert peak(front) - before < 5 * 17 * MIB
