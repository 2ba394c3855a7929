"""The bodies of /v1/messages and /v1/messages/count_tokens, and what they are in chat's terms."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kvmesh.common.errors import invalid
from kvmesh.frontend.anthropic.conversation import Block, Turn, chat_messages, system_text
from kvmesh.frontend.anthropic.message import Thoughts
from kvmesh.frontend.protocol import Body, ChatCompletionRequest, KvmeshOptions, unsupported, validate
from kvmesh.frontend.protocol.body import INT32_MAX, List
from kvmesh.frontend.protocol.renamed import renamed
from kvmesh.frontend.protocol.tools import Name

# Known fields that are not served.
REFUSED = frozenset(
    ("container", "mcp_servers", "context_management", "diagnostics", "inference_geo", "speed")
)
# Chat's fields -> Anthropic's, in errors.
NAMES = {
    "response_format.json_schema.schema": "output_config.format.schema",
    "response_format": "output_config.format",
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
}


class Tool(Body):
    type: str | None = None
    name: Name
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(Body):
    user_id: str | None = None


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1, le=INT32_MAX)
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(Body):
    model: str = Field(min_length=1)
    messages: List[Turn] = Field(min_length=1)
    system: str | List[Block] | None = None
    tools: List[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def chat(self) -> ChatCompletionRequest:
        """The same as a chat body. Raises KvmeshError for what is not served."""
        for name in REFUSED:
            if (self.model_extra or {}).get(name) is not None:
                raise unsupported(name, "is not supported; remove it")
        fields = {name: value for name, value in self._chat_fields().items() if value is not None}
        with renamed(NAMES):
            return validate(ChatCompletionRequest, fields)[0]

    def _chat_fields(self) -> dict[str, Any]:
        output = self.output_config or OutputConfig()
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": chat_messages(system_text(self.system), self.messages),
            "tools": self._tools(),
            **self._choice(),
            "reasoning_effort": output.effort,
        }
        if self.messages[-1].role == "assistant":
            # The answer goes on where the client has begun it.
            fields["continue_final_message"] = True
        if output.format is not None:
            schema = {"name": "output", "schema": output.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.thinking is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": self.thinking.type != "disabled"}
        return fields

    def _tools(self) -> list[dict[str, Any]] | None:
        if not self.tools:
            return None
        tools = []
        for i, tool in enumerate(self.tools):
            if tool.type not in (None, "custom"):
                raise unsupported(f"tools[{i}].type", f"{tool.type!r} is not supported; use 'custom'")
            if tool.input_schema is None:
                raise invalid(f"tools[{i}].input_schema is required", f"tools[{i}].input_schema")
            function = {"name": tool.name, "parameters": tool.input_schema}
            function |= tool.model_dump(include={"description", "strict"}, exclude_none=True)
            tools.append({"type": "function", "function": function})
        return tools

    def _choice(self) -> dict[str, Any]:
        choice = self.tool_choice
        if choice is None:
            return {}
        if choice.type == "tool" and not choice.name:
            raise invalid("tool_choice.name is required", "tool_choice.name")
        named = {"type": "function", "function": {"name": choice.name}}
        spelled: dict[str, Any] = {"auto": "auto", "any": "required", "tool": named, "none": "none"}
        parallel = None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use
        return {"tool_choice": spelled[choice.type], "parallel_tool_calls": parallel}


class MessagesRequest(CountTokensRequest):
    max_tokens: int = Field(ge=1, le=INT32_MAX)
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=INT32_MAX)
    stop_sequences: List[Annotated[str, Field(min_length=1)]] | None = Field(default=None, max_length=16)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    kvmesh: KvmeshOptions = Field(default_factory=KvmeshOptions)

    def _chat_fields(self) -> dict[str, Any]:
        return {
            **super()._chat_fields(),
            "max_completion_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences or None,
            "user": self.metadata.user_id if self.metadata else None,
            "kvmesh": self.kvmesh.model_dump(exclude_unset=True),
        }

    def thoughts(self) -> Thoughts:
        """How the answer shows what the model thinks: only where the client has asked for it."""
        if self.thinking is None or self.thinking.type == "disabled":
            return "none"
        return "sealed" if self.thinking.display == "omitted" else "shown"

    def ignored(self) -> list[str]:
        """Fields that change nothing."""
        return [name for name in self.model_extra or {} if name not in REFUSED]
