"""The mesh's OpenAI endpoint as the command line uses it: one streamed chat, and how it went."""

from __future__ import annotations

import json
import shlex
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from kvmesh.common.errors import KvmeshError
from kvmesh.v1.errors_pb2 import ErrorCode

# A CPU may compute a long prompt for a while before the first token.
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)


@dataclass
class Answer:
    """How a streamed chat went; complete once its stream is exhausted. Times in seconds."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = ""
    ttft_s: float | None = None
    total_s: float = 0.0
    # The `kvmesh` object: placement, cached_tokens, timing_ms, request_id.
    explanation: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float | None:
        """Rate after the first token; None where there was no second one."""
        if self.ttft_s is None or self.completion_tokens < 2:
            return None
        return (self.completion_tokens - 1) / max(self.total_s - self.ttft_s, 1e-6)

    def summary(self) -> str:
        """Who served it, time to the first token, rate."""
        placement = self.explanation.get("placement") or {}
        workers = [str(placement[key]) for key in ("prefill", "decode") if placement.get(key)]
        parts = [" → ".join(workers)] if workers else []
        if self.ttft_s is not None:
            parts.append(f"first token after {self.ttft_s * 1000:.0f} ms")
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens/s")
        parts.append(f"{self.completion_tokens} token{'' if self.completion_tokens == 1 else 's'}")
        cached = sum((self.explanation.get("cached_tokens") or {}).values())
        if cached:
            parts.append(f"{cached} of {self.prompt_tokens} prompt tokens cached")
        return " · ".join(parts)


def stream_chat(
    url: str,
    messages: list[dict[str, str]],
    answer: Answer,
    *,
    model: str = "default",
    key: str = "",
    certificate: str = "",
    **parameters: Any,
) -> Iterator[str]:
    """Pieces of the answer as they come; fills `answer`. Closing the iterator cancels the request.

    `key` is the API key, where one is asked for; `certificate` a file whose certificates are trusted under
    any name, for a mesh on this machine.

    Blocks. Raises KvmeshError with what the endpoint said, or that it cannot be reached.
    """
    body = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "kvmesh": {"explain": True},
        **parameters,
    }
    headers = {"authorization": f"Bearer {key}"} if key else {}
    started = time.monotonic()
    try:
        with (
            httpx.Client(timeout=_TIMEOUT, trust_env=False, verify=trust(certificate)) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as response,
        ):
            if response.status_code != 200:
                raise refused(response)
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                piece = _apply(json.loads(line[6:]), answer)
                if piece:
                    answer.total_s = time.monotonic() - started
                    answer.ttft_s = answer.ttft_s or answer.total_s
                    answer.text += piece
                    yield piece
    except httpx.TransportError as error:
        raise KvmeshError(
            ErrorCode.ERROR_CODE_UNAVAILABLE,
            f"cannot reach the endpoint at {url}: {error or type(error).__name__}",
        ) from None


def trust(certificate: str) -> ssl.SSLContext | bool:
    """Whom httpx shall trust: the file's certificates, under any name; without one, the system's."""
    if not certificate:
        return True
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    return context


def _apply(chunk: dict[str, Any], answer: Answer) -> str:
    if error := chunk.get("error"):
        raise KvmeshError(ErrorCode.ERROR_CODE_ENGINE_FAILED, str(error.get("message", error)))
    if usage := chunk.get("usage"):
        answer.prompt_tokens = usage.get("prompt_tokens", 0)
        answer.completion_tokens = usage.get("completion_tokens", 0)
    if explanation := chunk.get("kvmesh"):
        answer.explanation = explanation
    text = ""
    for choice in chunk.get("choices") or ():
        text += (choice.get("delta") or {}).get("content") or ""
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    return text


def refused(response: httpx.Response) -> KvmeshError:
    """What an answer that is no success says."""
    response.read()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:500]
    return KvmeshError(
        ErrorCode.ERROR_CODE_UNAVAILABLE, f"the endpoint answered {response.status_code}: {message}"
    )


def curl(url: str, prompt: str) -> str:
    """The same request for a shell, short enough to be read."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "stream": True,
    }
    data = shlex.quote(json.dumps(body, separators=(",", ":"), ensure_ascii=False))
    address = url.removeprefix("http://")
    flags = "-sNk" if url.startswith("https://") else "-sN"
    return f"curl {flags} {address}/v1/chat/completions -H 'content-type: application/json' -d {data}"
