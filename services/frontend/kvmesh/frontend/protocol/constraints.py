"""What the answer must be: OpenAI's `response_format`, and the fields vLLM and SGLang have for it.

Whether a schema or a grammar can be compiled is for the engine to say, before it computes anything.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

import orjson
from pydantic import Field

from kvmesh.common.errors import invalid
from kvmesh.frontend.protocol.body import Body, List
from kvmesh.v1.engine_pb2 import Constraint

# Characters of a schema or grammar, and levels of one; compilers are recursive, and slow for long ones.
_LONGEST = 131_072
_DEEPEST = 64
_ANY_OBJECT = '{"type": "object"}'

Text = Annotated[str, Field(min_length=1)]
Choices = Annotated[List[Text], Field(min_length=1, max_length=4_096)]
Schema = dict[str, Any] | bool | Text


class JsonSchemaFormat(Body):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's."""

    json_: Schema | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    structural_tag: Text | None = None


class Named(NamedTuple):
    """A constraint, and the client's field it comes from."""

    constraint: Constraint
    param: str


class ConstraintFields(Body):
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    json_schema: Text | None = None
    regex: Text | None = None
    ebnf: Text | None = None
    structural_tag: Text | None = None

    def constraint(self) -> Named | None:
        """The one constraint there is. Raises KvmeshError for two, and for one that cannot be right."""
        if _FIELDS.isdisjoint(self.model_fields_set):
            return None
        found = [named for named in self._constraints() if named is not None]
        if len(found) > 1:
            raise invalid(f"{found[1].param} and {found[0].param} exclude each other", found[1].param)
        return found[0] if found else None

    def _constraints(self) -> list[Named | None]:
        outputs = self.structured_outputs or StructuredOutputs()
        place = "structured_outputs"
        return [
            _format(self.response_format),
            schema_constraint(outputs.json_, f"{place}.json"),
            _text("regex", outputs.regex, f"{place}.regex"),
            _choice(outputs.choice, f"{place}.choice"),
            _text("ebnf", outputs.grammar, f"{place}.grammar"),
            _object(f"{place}.json_object") if outputs.json_object else None,
            tag_constraint(outputs.structural_tag, f"{place}.structural_tag"),
            schema_constraint(self.guided_json, "guided_json"),
            _text("regex", self.guided_regex, "guided_regex"),
            _choice(self.guided_choice, "guided_choice"),
            _text("ebnf", self.guided_grammar, "guided_grammar"),
            schema_constraint(self.json_schema, "json_schema"),
            _text("regex", self.regex, "regex"),
            _text("ebnf", self.ebnf, "ebnf"),
            tag_constraint(self.structural_tag, "structural_tag"),
        ]


_FIELDS = frozenset(ConstraintFields.model_fields)


def schema_constraint(schema: Schema | None, param: str) -> Named | None:
    """JSON by a schema, which may itself be JSON text."""
    if schema is None:
        return None
    if isinstance(schema, str):
        _check_length(schema, param)
        try:
            schema = orjson.loads(schema)
        except orjson.JSONDecodeError as error:
            raise invalid(f"{param} is not valid JSON: {error}", param) from None
    if not isinstance(schema, dict | bool):
        raise invalid(f"{param} must be a JSON schema", param)
    if _depth(schema) > _DEEPEST:
        raise invalid(f"{param} must not be nested deeper than {_DEEPEST} levels", param)
    return _text("json_schema", orjson.dumps(schema).decode(), param)


def _format(wanted: ResponseFormat | None) -> Named | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return _object("response_format")
    if wanted.type == "structural_tag":
        return tag_constraint(orjson.dumps(wanted.model_dump(exclude_unset=True)).decode(), "response_format")
    if wanted.json_schema is None:
        raise invalid("response_format.json_schema is required", "response_format.json_schema")
    place = "response_format.json_schema.schema"
    return schema_constraint(wanted.json_schema.schema_, place) or _object(place)


def _object(param: str) -> Named:
    return Named(Constraint(json_schema=_ANY_OBJECT), param)


def _choice(choices: list[str] | None, param: str) -> Named | None:
    if choices is None:
        return None
    # A JSON string is one in EBNF, too.
    return _text("ebnf", "root ::= " + " | ".join(json.dumps(choice) for choice in choices), param)


def tag_constraint(tag: str | None, param: str) -> Named | None:
    """An XGrammar structural tag, as JSON text."""
    if tag is None:
        return None
    _check_length(tag, param)
    try:
        parsed = orjson.loads(tag)
    except orjson.JSONDecodeError as error:
        raise invalid(f"{param} is not valid JSON: {error}", param) from None
    if not isinstance(parsed, dict) or _depth(parsed) > _DEEPEST:
        raise invalid(f"{param} must be an object of at most {_DEEPEST} levels", param)
    return _text("structural_tag", tag, param)


def _text(kind: str, text: str | None, param: str) -> Named | None:
    if text is None:
        return None
    _check_length(text, param)
    return Named(Constraint(**{kind: text}), param)


def _check_length(text: str, param: str) -> None:
    if len(text) > _LONGEST:
        raise invalid(f"{param} must not be longer than {_LONGEST} characters", param)


def _depth(value: Any) -> int:
    """Levels of a JSON value, counted without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return depth
