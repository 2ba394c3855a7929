"""The body of /v1/chat/completions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from kvmesh.common.errors import invalid
from kvmesh.frontend.protocol.body import INT32_MAX, List, unsupported
from kvmesh.frontend.protocol.constraints import Named
from kvmesh.frontend.protocol.generation import Effort, GenerationRequest, Metadata
from kvmesh.frontend.protocol.messages import ChatMessage, template_message
from kvmesh.frontend.protocol.sampling import MAX_TOP_LOGPROBS
from kvmesh.frontend.protocol.tools import ToolFields
from kvmesh.v1.engine_pb2 import SamplingParams
from kvmesh.v1.router_pb2 import ReturnHint

# Arguments of the call that renders the template, not of the template.
_RESERVED_TEMPLATE_ARGS = {
    "conversation",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "padding",
    "truncation",
    "max_length",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}


class ChatCompletionRequest(GenerationRequest, ToolFields):
    messages: List[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=INT32_MAX)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    reasoning_effort: Effort | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    modalities: List[str] | None = None
    store: bool | None = None
    """keep the completion, to be listed and read"""
    metadata: Metadata | None = None
    """labels of a stored completion"""
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    """begin a turn of the assistant's; the default unless `continue_final_message`"""
    continue_final_message: bool | None = None
    """the answer goes on with the last message, the assistant's"""

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
        for modality in self.modalities or ():
            if modality != "text":
                raise unsupported("modalities", f"{modality!r} is not supported; the model answers in text")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise invalid(
                    "continue_final_message and add_generation_prompt exclude each other",
                    "continue_final_message",
                )
            if self.messages[-1].role != "assistant":
                raise invalid(
                    "continue_final_message needs a last message of the assistant's", "continue_final_message"
                )
        self.functions()

    def sampling(self) -> SamplingParams:
        params = super().sampling()
        if self.max_completion_tokens is not None:
            params.max_new_tokens = self.max_completion_tokens
        if self.logprobs:
            params.top_logprobs = self.top_logprobs or 0
        return params

    def constraint(self) -> Named | None:
        # An answer that must be calls is no text for a format to hold for.
        return self.tools_constraint() or super().constraint()

    def return_hint(self) -> ReturnHint | None:
        hint = super().return_hint()
        # A loop of calls and results mostly goes on; where a call is asked for, its result is to come.
        if self.functions() and (self.must_call() or self.messages[-1].role == "tool"):
            hint = hint or ReturnHint()
            hint.tool_call = True
        return hint

    def conversation(self, start: int = 0, count: int | None = None) -> list[dict[str, Any]]:
        """The messages, or `count` of them from one on, as chat templates take them. Raises KvmeshError."""
        part = self.messages[start : None if count is None else start + count]
        return [template_message(f"messages[{i}]", message) for i, message in enumerate(part, start)]

    def template_args(self) -> dict[str, Any]:
        """What else the template, and the call that renders it, is given."""
        args = dict(self.chat_template_kwargs or {})
        for name in args:
            if name in _RESERVED_TEMPLATE_ARGS:
                raise unsupported(f"chat_template_kwargs.{name}", "is set by the server; remove it")
        for name in ("reasoning_effort", "verbosity"):
            if (value := getattr(self, name)) is not None:
                args.setdefault(name, value)
        if self.reasoning_effort == "none":
            # How templates with a switch rather than degrees call it.
            args.setdefault("enable_thinking", False)
        if functions := self.functions():
            args["tools"] = [
                {"type": "function", "function": f.model_dump(exclude_unset=True, exclude={"strict"})}
                for f in functions
            ]
        args["continue_final_message"] = bool(self.continue_final_message)
        args["add_generation_prompt"] = (
            not self.continue_final_message and self.add_generation_prompt is not False
        )
        return args
