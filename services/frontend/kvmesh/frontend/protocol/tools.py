"""The tools a model may call, which of them it must, and the constraint that makes it do so.

`functions` and `function_call` are OpenAI's former spelling of tools and their choice, with one call an
answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kvmesh.common.errors import invalid
from kvmesh.frontend.protocol.body import Body, List, unsupported
from kvmesh.frontend.protocol.constraints import Named, schema_constraint

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
# Calls in one answer where the model is made to call: without an end, some never find one.
_MOST_CALLS = 16
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class Function(Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: str
    function: Function | None = None


class FunctionName(Body):
    name: str


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: List[Tool] = Field(min_length=1)


class ToolChoice(Body):
    type: str
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


class ToolFields(Body):
    tools: List[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    former: List[Function] | None = Field(default=None, alias="functions", max_length=128)
    function_call: Literal["none", "auto"] | FunctionName | None = None

    @model_validator(mode="after")
    def _functions_are_tools(self) -> Self:
        if not self.former:
            if isinstance(self.function_call, FunctionName):
                raise invalid("function_call needs functions to choose from", "function_call")
            return self
        for name in ("tools", "tool_choice"):
            if getattr(self, name):
                raise invalid(f"{name} and functions exclude each other", name)
        self.tools = [Tool(type="function", function=function) for function in self.former]
        self.tool_choice = self.function_call if isinstance(self.function_call, str) else None
        if isinstance(self.function_call, FunctionName):
            self.tool_choice = ToolChoice(type="function", function=self.function_call)
        self.parallel_tool_calls = False
        return self

    def call_is_function(self) -> bool:
        """Whether the answer spells a call the former way."""
        return bool(self.former)

    def functions(self) -> list[Function]:
        """Those the model may call now. Raises KvmeshError for tools that are not functions."""
        given = self.tools_field()
        functions = [_function(f"{given}[{i}]", tool) for i, tool in enumerate(self.tools or ())]
        names = [function.name for function in functions]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise invalid(f"{given}[{i}]: the name {name!r} is taken by another", f"{given}[{i}]")
        allowed = self._allowed()
        for name in allowed or ():
            if name not in names:
                choice = "function_call" if self.former else "tool_choice"
                raise invalid(f"{choice} names {name!r}, which is not in {given}", choice)
        if self.tool_choice == "none":
            return []
        return [f for f in functions if allowed is None or f.name in allowed]

    def must_call(self) -> bool:
        """Whether the answer must be calls."""
        choice = self.tool_choice
        if isinstance(choice, ToolChoice):
            return choice.allowed_tools is None or choice.allowed_tools.mode == "required"
        return choice == "required"

    def forced_function(self) -> Function | None:
        """The one function that must be called, where the choice is a function by its name."""
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function is not None:
            return self.functions()[0]
        return None

    def tools_constraint(self) -> Named | None:
        """What makes the model call where it must: the arguments of the named function, or else an
        array of {name, arguments}."""
        if not self.must_call():
            return None
        functions = self.functions()
        if not functions:
            raise invalid("tool_choice needs tools to choose from", "tool_choice")
        named = self.forced_function()
        if named is not None:
            return schema_constraint(named.parameters or ANY_OBJECT, self.tools_field())
        most = 1 if self.parallel_tool_calls is False else _MOST_CALLS
        return schema_constraint(_calls_schema(functions, most), self.tools_field())

    def wants_strict_calls(self) -> bool:
        """Whether calls that the model makes of itself are to be by their functions' schemas."""
        return not self.must_call() and any(function.strict for function in self.functions())

    def tools_field(self) -> str:
        """Where the client has written them."""
        return "functions" if self.former else "tools"

    def _allowed(self) -> list[str] | None:
        choice = self.tool_choice
        if not isinstance(choice, ToolChoice):
            return None
        if choice.type == "function" and choice.function is not None:
            return [choice.function.name]
        if choice.type == "allowed_tools" and choice.allowed_tools is not None:
            place = "tool_choice.allowed_tools.tools"
            return [_function(f"{place}[{i}]", t).name for i, t in enumerate(choice.allowed_tools.tools)]
        raise unsupported("tool_choice.type", f"{choice.type!r} is not supported; name a function")


def _function(place: str, tool: Tool) -> Function:
    if tool.type != "function":
        raise unsupported(f"{place}.type", f"{tool.type!r} is not supported; use 'function'")
    if tool.function is None:
        raise invalid(f"{place}.function is required", f"{place}.function")
    return tool.function


def _calls_schema(functions: list[Function], most: int) -> dict[str, Any]:
    """Each function's schema stands under a name of its own, and its references point there."""
    schemas = {
        f"f{i}": _moved(function.parameters or ANY_OBJECT, f"#/$defs/f{i}")
        for i, function in enumerate(functions)
    }
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, "arguments": {"$ref": f"#/$defs/f{i}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, function in enumerate(functions)
    ]
    return {
        "type": "array",
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
        "minItems": 1,
        "maxItems": most,
        "$defs": schemas,
    }


def _moved(schema: Any, to: str) -> Any:
    """A schema whose root is at `to` now."""
    if isinstance(schema, list):
        return [_moved(item, to) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, to) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = to + reference[1:]
    return moved
