"""Tools: which may be called, which must, and the constraint for it."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.protocol import ChatCompletionRequest, parse
from kvmesh.frontend.protocol.strict import strict_calls
from kvmesh.v1.errors_pb2 import ErrorCode

INVALID = ErrorCode.ERROR_CODE_INVALID_ARGUMENT
UNSUPPORTED = ErrorCode.ERROR_CODE_UNSUPPORTED
HELLO = [{"role": "user", "content": "hello"}]


def tool(name: str, parameters: Any = None, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


def chat(**fields: Any) -> ChatCompletionRequest:
    request, _ = parse(ChatCompletionRequest, orjson.dumps({"model": "m", "messages": HELLO, **fields}))
    request.check()
    request.constraint()
    return request


F, G = tool("f", {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}}), tool("g")
NAMED = {"type": "function", "function": {"name": "g"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [tool("f")]}}


@pytest.mark.parametrize(
    ("choice", "names", "must"),
    [
        (None, ["f", "g"], False),
        ("auto", ["f", "g"], False),
        ("none", [], False),
        ("required", ["f", "g"], True),
        (NAMED, ["g"], True),
        (ALLOWED, ["f"], True),
    ],
)
def test_choices(choice: Any, names: list[str], must: bool) -> None:
    request = chat(tools=[F, G], tool_choice=choice)
    assert [function.name for function in request.functions()] == names
    assert request.must_call() is must
    assert (request.constraint() is not None) is must
    given = request.template_args().get("tools", [])
    assert [each["function"]["name"] for each in given] == names


@pytest.mark.parametrize(
    ("choice", "names", "must"),
    [(None, ["f", "g"], False), ("none", [], False), ({"name": "g"}, ["g"], True)],
)
def test_functions_are_tools(choice: Any, names: list[str], must: bool) -> None:
    request = chat(functions=[F["function"], G["function"]], function_call=choice)
    assert request.call_is_function()
    assert request.parallel_tool_calls is False
    assert [function.name for function in request.functions()] == names
    constraint = request.constraint()
    assert request.must_call() is must is (constraint is not None)
    assert constraint is None or constraint.param == "functions"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{}]}, "functions[0].name"),
        ({"functions": [F["function"], F["function"]]}, "functions[1]"),
        ({"functions": [F["function"]], "function_call": {"name": "g"}}, "function_call"),
        ({"functions": [F["function"]], "tools": [G]}, "tools"),
        ({"function_call": {"name": "g"}}, "function_call"),
    ],
)
def test_bad_functions(fields: Any, param: str) -> None:
    with pytest.raises(KvmeshError) as refused:
        chat(**fields)
    assert (refused.value.code, refused.value.param) == (INVALID, param)


def test_the_constraint_of_a_named_function_is_its_arguments() -> None:
    named = chat(tools=[F, G], tool_choice=NAMED).constraint()
    assert named is not None
    assert orjson.loads(named.constraint.json_schema) == {"type": "object"}
    assert named.param == "tools"


@pytest.mark.parametrize(("parallel", "most"), [(None, 16), (True, 16), (False, 1)])
def test_the_constraint_of_required_calls(parallel: bool | None, most: int) -> None:
    request = chat(
        tools=[F, G],
        tool_choice="required",
        parallel_tool_calls=parallel,
        response_format={"type": "json_object"},
    )
    named = request.constraint()
    assert named is not None
    schema = orjson.loads(named.constraint.json_schema)
    assert (schema["minItems"], schema["maxItems"]) == (1, most)
    first, second = schema["items"]["anyOf"]
    assert first["properties"] == {"name": {"const": "f"}, "arguments": {"$ref": "#/$defs/f0"}}
    assert second["properties"]["name"] == {"const": "g"}
    # References inside a function's schema follow it to where it stands now.
    assert schema["$defs"]["f0"]["properties"]["x"] == {"$ref": "#/$defs/f0/$defs/X"}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, UNSUPPORTED, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, INVALID, "tools[0].function"),
        ({"tools": [tool("a b")]}, INVALID, "tools[0].function.name"),
        ({"tools": [F, F]}, INVALID, "tools[1]"),
        ({"tools": [tool("f", [])]}, INVALID, "tools[0].function.parameters"),
        ({"tools": [F], "tool_choice": NAMED}, INVALID, "tool_choice"),
        ({"tool_choice": NAMED}, INVALID, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, INVALID, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "custom"}}, UNSUPPORTED, "tool_choice.type"),
        ({"tools": [F], "tool_choice": "required", "min_tokens": 3}, INVALID, "min_tokens"),
    ],
)
def test_bad_tools(fields: dict[str, Any], code: ErrorCode, param: str) -> None:
    with pytest.raises(KvmeshError) as caught:
        chat(**fields)
    assert (caught.value.code, caught.value.param) == (code, param)


INTEGER = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


def called(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("no call at all < tool >", True),
        (called("f", '{"x": 1}'), True),
        (called("f", '{"x": 1}') + " and " + called("g", '{"y": [2]}') + "\n", True),
        (called("f", '{"x": "1"}'), False),
        (called("f", "{}"), False),
        (called("g", "3"), False),
        (called("h", "{}"), False),
        ("<tool_call>what", False),
    ],
)
def test_strict_calls_are_free_text_until_a_call_begins(answer: str, accepted: bool) -> None:
    """By the grammar that SGLang makes of the tag."""
    from xgrammar import Grammar, StructuralTagItem
    from xgrammar.testing import _is_grammar_accept_string

    request = chat(tools=[tool("f", INTEGER, strict=True), tool("g", INTEGER)])
    assert request.wants_strict_calls()
    named = strict_calls(request.functions(), "hermes", "tools")
    assert named is not None
    tag = orjson.loads(named.constraint.structural_tag)
    structures = [
        StructuralTagItem(begin=s["begin"], schema=orjson.dumps(s["schema"]).decode(), end=s["end"])
        for s in tag["structures"]
    ]
    grammar = Grammar.from_structural_tag(structures, tag["triggers"])
    assert _is_grammar_accept_string(grammar, answer) is accepted


def test_formats_without_a_mark_cannot_be_held_to_schemas() -> None:
    request = chat(tools=[tool("f", INTEGER, strict=True)])
    assert strict_calls(request.functions(), "pythonic", "tools") is None
    assert strict_calls(request.functions(), None, "tools") is None


@pytest.mark.parametrize("choice", ["none", "required", {"type": "function", "function": {"name": "f"}}])
def test_only_calls_of_its_own_are_asked_to_be_strict(choice: Any) -> None:
    assert not chat(tools=[tool("f", INTEGER, strict=True)], tool_choice=choice).wants_strict_calls()
    assert not chat(tools=[tool("f", INTEGER)]).wants_strict_calls()
