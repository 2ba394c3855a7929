"""The body of /v1/responses, and what it is in chat's terms."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from kvmesh.common.errors import invalid
from kvmesh.frontend.protocol import Body, ChatCompletionRequest, KvmeshOptions, unsupported, validate
from kvmesh.frontend.protocol.body import INT32_MAX, List
from kvmesh.frontend.protocol.generation import Effort, Metadata, ServiceTier, UserId
from kvmesh.frontend.protocol.renamed import renamed
from kvmesh.frontend.protocol.sampling import MAX_TOP_LOGPROBS
from kvmesh.frontend.protocol.tools import Name
from kvmesh.frontend.responses.items import Item

# Known fields that are not served.
REFUSED = frozenset(("conversation", "prompt", "context_management", "moderation"))
# Chat's fields -> this API's, in errors.
NAMES = {
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "messages": "input",
}
_LOGPROBS = "message.output_text.logprobs"
_SEALED = "reasoning.encrypted_content"
# What else can be asked for is of tools and inputs that are not served, so it is never there.
_INCLUDES = frozenset(
    (
        _LOGPROBS,
        _SEALED,
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "web_search_call.action.sources",
        "web_search_call.results",
    )
)


class Format(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    format: Format | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Body):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class Tool(Body):
    type: str
    name: Name | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Body):
    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: List[Tool] | None = None


class StreamOptions(Body):
    # Padding against observers of lengths; nothing is padded.
    include_obfuscation: bool | None = None


class ConversationRequest(Body):
    """Of a conversation, which may have begun with responses that are stored."""

    model: str = Field(min_length=1)
    input: str | List[Item] | None = None
    """may be absent where a previous response is gone on with"""
    instructions: str | None = None
    previous_response_id: str | None = None

    def check(self) -> None:
        """Raise KvmeshError for what is not served."""
        for name in REFUSED:
            if (self.model_extra or {}).get(name) is not None:
                raise unsupported(name, "is not supported; remove it")
        if self.input is None and not self.previous_response_id:
            raise invalid("input is required, or previous_response_id", "input")
        if self.input is not None and not self.input:
            raise invalid("input must not be empty", "input")

    def chat(self, messages: list[dict[str, Any]]) -> ChatCompletionRequest:
        """The same as a chat body of these messages."""
        fields = {name: value for name, value in self._chat_fields().items() if value is not None}
        with renamed(NAMES):
            return validate(ChatCompletionRequest, {**fields, "messages": messages})[0]

    def ignored(self) -> list[str]:
        """Fields that change nothing."""
        return [name for name in self.model_extra or {} if name not in REFUSED]

    def _chat_fields(self) -> dict[str, Any]:
        return {"model": self.model}


class InputTokensRequest(ConversationRequest):
    """Of the prompt that a response would be given."""

    text: TextConfig | None = None
    tools: List[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None

    def _chat_fields(self) -> dict[str, Any]:
        text, reasoning = self.text or TextConfig(), self.reasoning or Reasoning()
        return {
            **super()._chat_fields(),
            "tools": [_tool(f"tools[{i}]", tool) for i, tool in enumerate(self.tools or ())] or None,
            "tool_choice": self._choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": reasoning.effort,
            "verbosity": text.verbosity,
            "response_format": _format(text.format),
        }

    def _choice(self) -> Any:
        choice = self.tool_choice
        if not isinstance(choice, ToolChoice):
            return choice
        if choice.type == "function":
            if not choice.name:
                raise invalid("tool_choice.name is required", "tool_choice.name")
            return {"type": "function", "function": {"name": choice.name}}
        if choice.type != "allowed_tools":
            raise unsupported("tool_choice.type", f"{choice.type!r} is not supported; name a function")
        place = "tool_choice.tools"
        tools = [_tool(f"{place}[{i}]", tool) for i, tool in enumerate(choice.tools or ())]
        if not tools:
            raise invalid(f"{place} must not be empty", place)
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode or "auto", "tools": tools}}


class ResponsesRequest(InputTokensRequest):
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    """keep the response, to be asked for and continued; the default"""
    background: bool | None = None
    """answer at once, and go on; needs `store`"""
    max_output_tokens: int | None = Field(default=None, ge=1, le=INT32_MAX)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    include: List[str] | None = None
    metadata: Metadata | None = None
    service_tier: ServiceTier | None = None
    session: str | None = Field(default=None, max_length=256)
    prompt_cache_key: str | None = None
    user: str | None = None
    safety_identifier: UserId | None = None
    max_tool_calls: int | None = Field(default=None, ge=1)
    """of built-in tools, of which there are none"""
    kvmesh: KvmeshOptions = Field(default_factory=KvmeshOptions)

    def stored(self) -> bool:
        return self.store is not False

    def sealed(self) -> bool:
        """Whether reasoning is also sent in the form in which it can be given back unread."""
        return _SEALED in (self.include or ())

    def check(self) -> None:
        super().check()
        if self.background and not self.stored():
            raise invalid("background needs store not to be false", "background")
        for name in self.include or ():
            if name not in _INCLUDES:
                raise invalid(f"include must hold what can be included, not {name[:64]!r}", "include")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed when stream is true", "stream_options")

    def _chat_fields(self) -> dict[str, Any]:
        return {
            **super()._chat_fields(),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": bool(self.top_logprobs) or _LOGPROBS in (self.include or ()) or None,
            "top_logprobs": self.top_logprobs,
            "service_tier": self.service_tier,
            "session": self.session,
            "prompt_cache_key": self.prompt_cache_key,
            "user": self.user,
            "safety_identifier": self.safety_identifier,
            "kvmesh": self.kvmesh.model_dump(exclude_unset=True),
        }


def _tool(place: str, tool: Tool) -> dict[str, Any]:
    if tool.type != "function":
        raise unsupported(f"{place}.type", f"{tool.type!r} is not supported; use 'function'")
    if not tool.name:
        raise invalid(f"{place}.name is required", f"{place}.name")
    return {"type": "function", "function": tool.model_dump(include=_FUNCTION, exclude_none=True)}


_FUNCTION = {"name", "description", "parameters", "strict"}


def _format(wanted: Format | None) -> dict[str, Any] | None:
    if wanted is None or wanted.type != "json_schema":
        return None if wanted is None else {"type": wanted.type}
    if not wanted.name or wanted.schema_ is None:
        raise invalid("text.format needs a name and a schema", "text.format")
    return {"type": "json_schema", "json_schema": {"name": wanted.name, "schema": wanted.schema_}}
