"""Every example runs against real engines and says what its first lines promise."""

from __future__ import annotations

import re

import pytest

from fixtures.examples import EXAMPLES, run_example
from fixtures.mesh import Mesh

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(240)]

QUESTION = "What is the capital of France?"
# What each prints, as expressions; `{}` in its arguments is the mesh's gRPC address.
SAID: dict[str, tuple[list[str], list[str]]] = {
    "openai_client.py": ([QUESTION], ["Paris", r"\d+ prompt \+ \d+ output tokens", "'decode': 'decode-0'"]),
    "openai_tools.py": (
        [],
        [
            r'^weather\(\{"city": ?"\w+", ?"unit": ?"\w+"\}\) -> \{"city": "\w+", ".*: [\d.]+\}$',
            r"^answer: \w",
        ],
    ),
    "openai_structured.py": ([], [r"^(Paris|Rome|Oslo) in (France|Italy|Norway) has \d+ districts$"]),
    "openai_responses.py": (
        [],
        ["^first: .*Paris", r"^then: \w", r"^\d+ input tokens, \d+ of them cached$"],
    ),
    "anthropic_messages.py": ([], [r"^\w", r"^(end_turn|max_tokens): \d+ output tokens$"]),
    "langchain_chat.py": (
        [],
        [r"Paris", r"^calls Weather\(\{'city': '\w+', 'unit': '\w+'\}\)$", r"^name='(Paris|Rome|Oslo)'$"],
    ),
    "grpc_client_async.py": (
        ["--address", "{}", QUESTION],
        ["Paris", "first token after", "served by prefill-0 -> decode-0"],
    ),
    "grpc_client.py": (
        ["--address", "{}", QUESTION],
        ["Paris", "served: SmolLM2", "served by prefill-0 -> decode-0"],
    ),
}
# Those of other meshes' tests: a model that embeds, a router asked by itself.
ELSEWHERE = {"openai_embeddings.py": "test_many_models.py", "route_only.py": "test_route_only.py"}


@pytest.mark.parametrize("name", SAID)
def test_it_runs(split_mesh: Mesh, name: str) -> None:
    arguments, expected = SAID[name]
    said = run_example(split_mesh, name, *(argument.format(split_mesh.grpc) for argument in arguments))
    for expression in expected:
        assert re.search(expression, said, re.MULTILINE), said


def test_none_is_left_out() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == SAID.keys() | ELSEWHERE.keys()
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in EXAMPLES.iterdir() if path.name != "README.md")
