"""List the models, stream a chat answer and compare two texts over gRPC. Needs `kvmesh-client` alone.

.venv/bin/python examples/grpc_client.py "What is the capital of France?"
"""

from __future__ import annotations

import argparse
import sys

from kvmesh.client import Client, RequestError
from kvmesh.v1.common_pb2 import CAPABILITY_EMBED


def main() -> int:
    parser = argparse.ArgumentParser(description="Use a frontend over gRPC.")
    parser.add_argument("prompt", help="what to ask")
    parser.add_argument("--address", default="localhost:8001", help="host:port of the frontend's gRPC server")
    parser.add_argument("--api-key", default="", help="where the frontend asks for one")
    options = parser.parse_args()
    with Client(options.address, api_key=options.api_key, timeout=120) as client:
        try:
            models = client.models()
            print(f"served: {', '.join(model.name for model in models)}\n")
            message = {"role": "user", "content": options.prompt}
            answer, ran = "", None
            for piece in client.chat([message], temperature=0, max_new_tokens=256, explain=True):
                print(piece.text, end="", flush=True)
                answer, ran = answer + piece.text, piece.kvmesh
            if ran is not None:
                print(f"\n\nserved by {f'{ran.prefill} -> ' if ran.prefill else ''}{ran.decode}")
            for model in models:
                if CAPABILITY_EMBED in model.capabilities:
                    one, other = client.embed([options.prompt, answer], model=model.name)
                    near = sum(a * b for a, b in zip(one, other, strict=True))
                    print(f"\nquestion and answer, by {model.name}: {near:.2f}")
        except RequestError as error:
            print(f"error: {error.message}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
