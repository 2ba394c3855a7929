"""A gateway of another make that uses kvmesh's router, and nothing else of its front.

It asks the router where each request runs, runs it on the workers itself, and reports how it fares. The
requests are a conversation in token ids, so that later turns find their beginning cached.

.venv/bin/python examples/route_only.py --turns 3
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator

import grpc.aio

from kvmesh.common.errors import KvmeshError
from kvmesh.core import hash_tokens
from kvmesh.v1.common_pb2 import KvInfo
from kvmesh.v1.engine_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    EngineRequest,
    GenerateRequest,
    PrefillRequest,
    RequestStep,
    SamplingParams,
)
from kvmesh.v1.engine_pb2_grpc import DecodeServiceStub, PrefillServiceStub
from kvmesh.v1.router_pb2 import (
    GetStateRequest,
    LeaseReport,
    ReportRequest,
    RouteRequest,
    RouteResponse,
    SelectRequest,
)
from kvmesh.v1.router_pb2_grpc import RouterServiceStub

# A lease is renewed by reports; it would last for `lease.ttl_ms` without.
REPORT_EVERY_S = 1.0


class Gateway:
    """Everything it knows of the mesh it has from the router."""

    def __init__(self, router: str, model: str, max_tokens: int) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._router = RouterServiceStub(self._channel(router))

    async def kv(self) -> KvInfo:
        """Of the model's workers: the page size that prompts are hashed by, and the hashes' namespace."""
        state = await self._router.GetState(GetStateRequest(), timeout=10)
        for worker in state.workers:
            model = worker.info.model
            if self._model in (model.name, *model.aliases) and worker.info.kv.page_size:
                return worker.info.kv
        raise SystemExit(f"error: no worker serves `{self._model}`")

    async def turn(self, name: str, prompt: list[int], kv: KvInfo) -> list[int]:
        """Place a prompt, run it, and say where; returns the tokens that follow it."""
        route = RouteRequest(
            request_id=name,
            model=self._model,
            block_hashes=hash_tokens(prompt, kv.page_size, kv.namespace).tolist(),
            prompt_tokens=len(prompt),
            max_new_tokens=self._max_tokens,
        )
        # What would be chosen: for looking ahead, or for gateways that account for their requests themselves.
        selected = await self._router.Select(SelectRequest(route=route), timeout=10)
        # Waits while the workers are busy. From here on the request counts, until its end is reported.
        placed = await self._router.Route(route, timeout=60)
        output: list[int] = []
        try:
            async for tokens in self._run(name, prompt, placed):
                output.extend(tokens)
        finally:
            await self._report(LeaseReport(lease_id=placed.lease.id, output_tokens=len(output), ended=True))
        where = placed.placement
        workers = f"{where.prefill.id} -> {where.decode.id}" if where.prefill.id else where.decode.id
        cached = placed.expected.cached.device
        print(
            f"{name} on {workers}: {len(prompt)} prompt tokens, {cached} cached, {len(output)} output tokens"
        )
        print(f"  by {placed.policy}, first token expected after {selected.predicted_ttft_ms:.0f} ms")
        return output

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def _run(self, name: str, prompt: list[int], placed: RouteResponse) -> AsyncIterator[list[int]]:
        """The request on one worker, or on a pair that is given it at once and meets at a bootstrap room."""
        where, lease = placed.placement, placed.lease.id
        split = bool(where.prefill.id)
        request = EngineRequest(
            id=1,
            request_id=name,
            token_ids=prompt,
            sampling=SamplingParams(temperature=0, max_new_tokens=self._max_tokens),
            bootstrap=where.bootstrap if split else None,
        )
        decode = DecodeServiceStub(self._channel(where.decode.address)).Generate()
        await decode.write(GenerateRequest(start=request))
        prefill = asyncio.create_task(self._prefill(request, where.prefill.address, lease)) if split else None
        count, reported = 0, 0.0
        try:
            async for response in decode:
                for step in response.steps:
                    count += len(step.token_ids)
                    if count and time.monotonic() - reported > REPORT_EVERY_S:
                        reported = time.monotonic()
                        # Whose prompt is on a prefill worker, that one says when it is computed.
                        await self._report(
                            LeaseReport(lease_id=lease, prefill_done=not split, output_tokens=count)
                        )
                    yield list(step.token_ids)
                    if finished(step, where.decode.id):
                        if prefill is not None:
                            await prefill
                        return
            raise SystemExit(f"error: worker {where.decode.id} gave the request up")
        finally:
            # Ends the request there, if it is not over.
            decode.cancel()
            if prefill is not None:
                prefill.cancel()

    async def _prefill(self, request: EngineRequest, address: str, lease: int) -> None:
        call = PrefillServiceStub(self._channel(address)).Prefill()
        await call.write(PrefillRequest(start=request))
        try:
            async for response in call:
                for step in response.steps:
                    if finished(step, address):
                        # The worker is free for the next prompt: said at once, and what moving the KV took.
                        moved = step.timing.transfer_ms
                        await self._report(LeaseReport(lease_id=lease, prefill_done=True, transfer_ms=moved))
                        return
        finally:
            call.cancel()

    async def _report(self, report: LeaseReport) -> None:
        await self._router.Report(ReportRequest(reports=[report]), timeout=10)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address)
        return self._channels[address]


def finished(step: RequestStep, worker: str) -> bool:
    """Whether a step is a request's last."""
    if not step.HasField("finish"):
        return False
    if step.finish.reason not in (FINISH_REASON_STOP, FINISH_REASON_LENGTH):
        raise SystemExit(f"error: worker {worker}: {step.finish.error.message or 'gave the request up'}")
    return True


async def main() -> int:
    parser = argparse.ArgumentParser(description="Run a conversation by kvmesh's router alone.")
    parser.add_argument("--router", default="localhost:8100", help="host:port of the router")
    parser.add_argument("--model", default="default", help="model name or alias")
    parser.add_argument("--turns", type=int, default=3, help="turns of the conversation")
    parser.add_argument("--prompt-tokens", type=int, default=200, help="tokens that each turn adds")
    parser.add_argument("--max-tokens", type=int, default=16, help="longest answer of a turn")
    options = parser.parse_args()

    gateway = Gateway(options.router, options.model, options.max_tokens)
    try:
        kv = await gateway.kv()
        history: list[int] = []
        for turn in range(options.turns):
            history += [1000 + (turn * 7919 + at * 131) % 20_000 for at in range(options.prompt_tokens)]
            history += await gateway.turn(f"turn-{turn}", history, kv)
    except grpc.aio.AioRpcError as error:
        print(f"error: {KvmeshError.from_rpc(error, options.router).message}", file=sys.stderr)
        return 1
    finally:
        await gateway.close()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
