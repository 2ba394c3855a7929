"""A load generator of its own process: so many streams at once against /v1/completions, for so long.

Run as a program it prints one JSON object; `drive` starts it. One asyncio protocol a connection, kept
alive, and nothing parsed but where chunks begin: a client that costs more would be measured instead.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

_END = b"data: [DONE]"


@dataclass
class Load:
    """What was seen after the warm-up. Times in milliseconds; `itl` is of all gaps between tokens."""

    seconds: float = 0.0
    # That were answered.
    requests: int = 0
    errors: int = 0
    ttft: dict[str, float] = field(default_factory=dict)
    itl: dict[str, float] = field(default_factory=dict)


class _Connection(asyncio.Protocol):
    """Asks again as soon as it has been answered, until `run.over`."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._transport: asyncio.Transport | None = None
        self._sent = self._first = self._last = 0.0
        self._chunks = 0
        self._tail = b""
        self._bad = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._run.over:
            self._run.load.errors += 1
        self._run.left()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._chunks and not self._bad and data.startswith(b"HTTP/1.1"):
            self._bad = not data.startswith(b"HTTP/1.1 200")
        text = self._tail + data
        # Chunks with tokens; what a token's chunk is cut into counts once, by its beginning.
        chunks = text.count(b"data: {")
        if chunks:
            if not self._first:
                self._first = now
            elif self._run.counting:
                self._run.itls.append(now - self._last)
            if self._run.counting:
                # What comes together has no time between it.
                self._run.itls += [0.0] * (chunks - 1)
            self._last = now
            self._chunks += chunks
        self._tail = text[-len(_END) :] if not text.endswith(b"\n") else b""
        if self._bad or _END in text:
            self._answered()

    def _answered(self) -> None:
        run = self._run
        if run.counting and self._bad:
            run.load.errors += 1
        elif run.counting:
            run.load.requests += 1
            run.ttfts.append(self._first - self._sent)
        if run.over:
            assert self._transport is not None
            self._transport.close()
        else:
            self._ask()

    def _ask(self) -> None:
        self._first, self._chunks, self._tail, self._bad = 0.0, 0, b"", False
        self._sent = time.perf_counter()
        assert self._transport is not None
        self._transport.write(self._run.request())


class _Run:
    def __init__(self, url: str, model: str, prompt_tokens: int, tokens: int) -> None:
        where = urlsplit(url)
        self.host, self.port = where.hostname or "127.0.0.1", where.port or 80
        self.tokens = tokens
        self.load = Load()
        self.ttfts: list[float] = []
        self.itls: list[float] = []
        self.counting = self.over = False
        self._model, self._prompt_tokens = model, prompt_tokens
        self._open = 0
        self._closed = asyncio.Event()

    def request(self) -> bytes:
        """A prompt whose first tenth is shared by all, as a system prompt is."""
        shared = self._prompt_tokens // 10
        prompt = [*range(1000, 1000 + shared)]
        prompt += [random.randrange(1_000, 40_000) for _ in range(self._prompt_tokens - shared)]
        body = json.dumps(
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": self.tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()
        return (
            b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
            b"content-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )

    def left(self) -> None:
        self._open -= 1
        if not self._open:
            self._closed.set()

    async def go(self, streams: int, warmup: float, seconds: float) -> Load:
        loop = asyncio.get_running_loop()
        for _ in range(streams):
            self._open += 1
            await loop.create_connection(lambda: _Connection(self), self.host, self.port)
        await asyncio.sleep(warmup)
        print("counting", flush=True)
        self.counting, began = True, time.perf_counter()
        await asyncio.sleep(seconds)
        self.counting = False
        self.load.seconds = time.perf_counter() - began
        print("counted", flush=True)
        self.over = True
        await asyncio.wait_for(self._closed.wait(), 60)
        self.load.ttft, self.load.itl = _percentiles(self.ttfts), _percentiles(self.itls)
        return self.load


def _percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ordered = sorted(seconds)
    return {name: 1e3 * ordered[int(share * len(ordered))] for name, share in (("p50", 0.5), ("p99", 0.99))}


async def drive(
    url: str,
    model: str,
    streams: int,
    prompt_tokens: int,
    tokens: int,
    warmup: float,
    seconds: float,
    cpu: Any,
) -> tuple[Load, float]:
    """Run the load in a process of its own; returns it and what `cpu()` grew by while it counted."""
    arguments = [url, model, streams, prompt_tokens, tokens, warmup, seconds]
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, *map(str, arguments), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    marks: list[float] = []
    for _ in range(2):
        if not await process.stdout.readline():
            raise RuntimeError(f"the load generator failed against {url}")
        marks.append(cpu())
    last = await process.stdout.readline()
    await process.wait()
    return Load(**json.loads(last)), marks[1] - marks[0]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("streams", type=int)
    parser.add_argument("prompt_tokens", type=int)
    parser.add_argument("tokens", type=int)
    parser.add_argument("warmup", type=float)
    parser.add_argument("seconds", type=float)
    given = parser.parse_args()

    async def run() -> Load:
        load = _Run(given.url, given.model, given.prompt_tokens, given.tokens)
        return await load.go(given.streams, given.warmup, given.seconds)

    print(json.dumps(asdict(uvloop.run(run()))), flush=True)


if __name__ == "__main__":
    _main()
