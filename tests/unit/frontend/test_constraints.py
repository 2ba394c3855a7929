"""What an answer must be: every way of saying it, and what cannot be right."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.protocol import ChatCompletionRequest, parse
from kvmesh.frontend.protocol.constraints import Named
from kvmesh.v1.errors_pb2 import ErrorCode

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def constraint(**fields: Any) -> Named | None:
    request, _ = parse(ChatCompletionRequest, orjson.dumps({"model": "m", "messages": HELLO, **fields}))
    request.check()
    return request.constraint()


def formatted(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", "response_format"),
        (
            {"response_format": formatted(SCHEMA, strict=True)},
            "json_schema",
            "response_format.json_schema.schema",
        ),
        ({"guided_json": SCHEMA}, "json_schema", "guided_json"),
        ({"guided_json": '{"type": "string"}'}, "json_schema", "guided_json"),
        ({"guided_regex": "[ab]+"}, "regex", "guided_regex"),
        ({"guided_grammar": 'root ::= "x"'}, "ebnf", "guided_grammar"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", "structured_outputs.json"),
        ({"structured_outputs": {"json_object": True}}, "json_schema", "structured_outputs.json_object"),
        ({"structured_outputs": {"regex": "a"}}, "regex", "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "ebnf", "structured_outputs.grammar"),
        ({"json_schema": '{"type": "object"}'}, "json_schema", "json_schema"),
        ({"regex": "a"}, "regex", "regex"),
        ({"ebnf": "root ::= x"}, "ebnf", "ebnf"),
        (
            {"response_format": {"type": "structural_tag", "structures": [], "triggers": []}},
            "structural_tag",
            "response_format",
        ),
    ],
)
def test_every_way_of_asking(fields: dict[str, Any], kind: str, param: str) -> None:
    named = constraint(**fields)
    assert named is not None
    assert named.constraint.WhichOneof("kind") == kind
    assert named.param == param


def test_no_constraint() -> None:
    assert constraint() is None
    assert constraint(response_format={"type": "text"}, structured_outputs={}, guided_json=None) is None


def test_choices_are_quoted() -> None:
    named = constraint(guided_choice=["yes", 'say "no"\n', "né"])
    assert named is not None
    assert named.constraint.ebnf == 'root ::= "yes" | "say \\"no\\"\\n" | "n\\u00e9"'


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": formatted(3)}, "response_format.json_schema.schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "3"}, "guided_json"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"regex": "a" * 200_000}, "regex"),
        ({"guided_json": SCHEMA, "regex": "a"}, "regex"),
        ({"response_format": {"type": "json_object"}, "ebnf": "root ::= x"}, "ebnf"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens"),
    ],
)
def test_what_cannot_be_right(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(KvmeshError) as caught:
        constraint(**fields)
    assert (caught.value.code, caught.value.param) == (ErrorCode.ERROR_CODE_INVALID_ARGUMENT, param)


def test_deep_schemas_are_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(200):
        schema = {"items": schema}
    with pytest.raises(KvmeshError) as caught:
        constraint(guided_json=schema)
    assert caught.value.param == "guided_json"
