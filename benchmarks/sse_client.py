"""A streaming completion client that costs little.

On a small machine a heavy one would be measured instead of the mesh.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Stream:
    """When things happened (`time.perf_counter`), and what the last chunks carried."""

    sent: float
    tokens: list[float] = field(default_factory=list)
    kvmesh: dict[str, Any] = field(default_factory=dict)


async def stream_completion(url: str, prompt: list[int], max_tokens: int, **fields: Any) -> Stream:
    """Stream one /v1/completions request to its end. Raises RuntimeError on any other answer than 200."""
    where = urlsplit(url)
    body = json.dumps(
        {
            "model": "default",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            **fields,
        }
    ).encode()
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        stream = Stream(sent=time.perf_counter())
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
            b"connection: close\r\ncontent-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError((status + await reader.read()).decode(errors="replace"))
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            # Not parsed: a json.loads a token would cost more than the mesh.
            if b'"finish_reason":null' in line:
                stream.tokens.append(now)
            elif b'"kvmesh"' in line:
                stream.kvmesh = json.loads(line[6:]).get("kvmesh", {})
        return stream
    finally:
        writer.close()
