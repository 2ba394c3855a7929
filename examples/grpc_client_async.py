"""Stream a chat answer over gRPC, under asyncio. Needs `kvmesh-client` alone.

.venv/bin/python examples/grpc_client_async.py "What is the capital of France?"
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from kvmesh.client import AsyncClient, RequestError
from kvmesh.v1.frontend_pb2 import ChatResponse


async def main() -> int:
    parser = argparse.ArgumentParser(description="Stream a chat answer over gRPC.")
    parser.add_argument("prompt", help="what to ask")
    parser.add_argument("--address", default="localhost:8001", help="host:port of the frontend's gRPC server")
    parser.add_argument("--api-key", default="", help="where the frontend asks for one")
    parser.add_argument("--model", default="default", help="model name or alias")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for the whole answer")
    options = parser.parse_args()

    last = ChatResponse()
    async with AsyncClient(options.address, api_key=options.api_key, timeout=options.timeout) as client:
        try:
            async for piece in client.chat(
                [{"role": "user", "content": options.prompt}],
                model=options.model,
                temperature=options.temperature,
                max_new_tokens=options.max_tokens,
                explain=True,
            ):
                print(piece.text, end="", flush=True)
                last = piece
        except RequestError as error:
            print(f"error: {error.message}", file=sys.stderr)
            return 1

    ran, used = last.kvmesh, last.usage
    served_by = f"{ran.prefill} -> {ran.decode}" if ran.prefill else ran.decode
    print(f"\n\n{used.prompt_tokens} prompt + {used.completion_tokens} output tokens ({last.finish_reason})")
    print(
        f"served by {served_by} ({ran.mode}), first token after {ran.timing.ttft:.0f} ms, "
        f"all after {ran.timing.total:.0f} ms, {used.cached.device} prompt tokens cached on the device"
    )
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
