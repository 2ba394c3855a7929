"""`kvmesh simulate record`: what requests to a served mesh took, as `kvmesh simulate fit` reads it."""

from __future__ import annotations

import asyncio
import json
import math
import random
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from kvmesh.cli.endpoint import refused, trust
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.errors_pb2 import ErrorCode

# Shorter prompts than this, and shorter answers, say little of a token's time.
SHORTEST_PROMPT, SHORTEST_ANSWER = 16, 4
# Letters of the text whose tokens the prompts are made of: any model has hundreds of them in so many.
_TEXT = 4096
# A CPU may have much to compute before it answers.
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in Poisson arrivals, their lengths spread evenly over their orders of magnitude; in tokens."""

    requests: int
    per_second: float
    longest_prompt: int
    longest_answer: int
    seed: int

    def planned(self) -> list[tuple[float, int, int]]:
        """Each one's arrival in seconds, tokens of its prompt, and of its answer."""
        chance, at, planned = random.Random(self.seed), 0.0, []
        for _ in range(self.requests):
            prompt = _spread(chance, SHORTEST_PROMPT, self.longest_prompt)
            planned.append((at, prompt, _spread(chance, SHORTEST_ANSWER, self.longest_answer)))
            at += chance.expovariate(self.per_second)
        return planned


class Endpoint:
    """One OpenAI endpoint, and a model behind it. Raises KvmeshError with what the endpoint says."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client, self._model = client, model

    async def record(self, load: Load, done: Callable[[], None]) -> list[dict[str, Any]]:
        """Send a load, and return a line for each request; `done` is called when one has ended."""
        vocabulary = await self._vocabulary(load.seed)
        chance, began = random.Random(load.seed), time.monotonic()

        async def one(at: float, prompt: Sequence[int], answer_tokens: int) -> dict[str, Any]:
            await asyncio.sleep(began + at - time.monotonic())
            line = await self._measured(prompt, answer_tokens, began)
            done()
            return line

        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(one(at, chance.choices(vocabulary, k=prompt), answer))
                    for at, prompt, answer in load.planned()
                ]
        except* KvmeshError as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in running]

    async def _measured(self, prompt: Sequence[int], answer_tokens: int, began: float) -> dict[str, Any]:
        arrival_ms = 1000 * (time.monotonic() - began)
        answer = await self._post(
            "/v1/completions",
            prompt=prompt,
            max_tokens=answer_tokens,
            temperature=0,
            ignore_eos=True,
            kvmesh={"explain": True},
        )
        # By the frontend's clock: how fast this process reads is no part of it.
        timing, tokens = answer["kvmesh"]["timing_ms"], answer["usage"]["completion_tokens"]
        line = {
            "arrival_ms": round(arrival_ms, 3),
            "prompt_tokens": answer["usage"]["prompt_tokens"],
            "cached_tokens": sum(answer["kvmesh"]["cached_tokens"].values()),
            "output_tokens": tokens,
            "ttft_ms": timing["ttft"],
        }
        if tokens > 1:
            line["itl_ms"] = round((timing["total"] - timing["ttft"]) / (tokens - 1), 3)
        return line

    async def _vocabulary(self, seed: int) -> list[int]:
        """Token ids that the model takes, whatever its vocabulary is."""
        letters = random.Random(seed).choices(string.ascii_letters, k=_TEXT)
        return (await self._post("/v1/tokenize", prompt="".join(letters)))["tokens"]

    async def _post(self, path: str, **fields: Any) -> dict[str, Any]:
        try:
            response = await self._client.post(path, json={"model": self._model, **fields})
        except httpx.TransportError as error:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_UNAVAILABLE,
                f"cannot reach the endpoint at {self._client.base_url}: {error or type(error).__name__}",
            ) from None
        if response.status_code != 200:
            raise refused(response)
        return response.json()


async def record(
    url: str,
    load: Load,
    done: Callable[[], None] = lambda: None,
    *,
    model: str = "default",
    key: str = "",
    certificate: str = "",
) -> str:
    """Send a load to the endpoint at `url`, and return a line of JSON for each request, in order of arrival.

    Arguments and errors are those of `kvmesh.cli.endpoint.stream_chat`.
    """
    async with httpx.AsyncClient(
        base_url=url,
        headers={"authorization": f"Bearer {key}"} if key else {},
        timeout=_TIMEOUT,
        limits=httpx.Limits(max_connections=None),
        trust_env=False,
        verify=trust(certificate),
    ) as client:
        lines = await Endpoint(client, model).record(load, done)
    return "".join(json.dumps(line) + "\n" for line in lines)


def _spread(chance: random.Random, least: int, most: int) -> int:
    return round(math.exp(chance.uniform(math.log(least), math.log(max(least, most)))))
