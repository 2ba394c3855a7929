"""Bodies and queries in the served OpenAPI description; FastAPI does not see them: the routes parse them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes `kind` as its JSON body."""
    schema = _inline(kind.model_json_schema(), {})
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def query_schema(**parameters: dict[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads these from its query: names -> JSON schemas."""
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in parameters.items()
        ]
    }


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    """`node` without references: an operation has no place for definitions of its own."""
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    definitions = node.get("$defs", definitions)
    if "$ref" in node:
        target = definitions[node["$ref"].removeprefix("#/$defs/")]
        return _inline({**target, **{k: v for k, v in node.items() if k != "$ref"}}, definitions)
    return {key: _inline(value, definitions) for key, value in node.items() if key != "$defs"}
