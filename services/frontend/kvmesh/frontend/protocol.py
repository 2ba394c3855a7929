"""OpenAI request bodies: what is taken, what is refused by name, what is ignored and reported.

A body is parsed and validated once; nothing of pydantic remains on the path of a token. Types are
strict: `"temperature": "0.5"` is an error, as it is at OpenAI.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.frontend.problems import explain_problem
from kvmesh.v1.engine_pb2 import SamplingParams
from kvmesh.v1.errors_pb2 import ErrorCode

_INT32_MAX = 2**31 - 1
# Lists stop at their first bad item: a body may hold millions.
Item = TypeVar("Item")
List = Annotated[list[Item], Field(fail_fast=True)]
StopString = Annotated[str, Field(min_length=1)]
StopStringList = Annotated[List[StopString], Field(max_length=16)]
TokenId = Annotated[int, Field(ge=0, le=_INT32_MAX)]


class _Body(BaseModel):
    """Unknown fields are kept in `model_extra`, to be named in the answer."""

    model_config = ConfigDict(extra="allow", strict=True)


class SamplingFields(_Body):
    """What REST and gRPC share; null and absent mean the model's default."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=_INT32_MAX)
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    max_tokens: int | None = Field(default=None, ge=1, le=_INT32_MAX)
    min_tokens: int | None = Field(default=None, ge=0, le=_INT32_MAX)
    stop_token_ids: List[TokenId] | None = Field(default=None, max_length=256)
    ignore_eos: bool | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**64 - 1)

    def sampling(self) -> SamplingParams:
        """The same for an engine. Output is bounded by `call.make_call`, not here."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            # 0 is another spelling of "all".
            top_k=self.top_k or None,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=self.max_tokens,
            min_new_tokens=self.min_tokens,
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=self.ignore_eos,
            # Engines take 63 bits.
            seed=None if self.seed is None else self.seed & (2**63 - 1),
        )


class StreamOptions(_Body):
    include_usage: bool | None = None


class KvmeshOptions(BaseModel):
    """The request's `kvmesh` object."""

    model_config = ConfigDict(extra="forbid", strict=True)

    explain: bool = False
    """answer with a `kvmesh` object: where the request ran and how long each part took"""
    policy: str = Field(default="", max_length=64)
    """the router's policy for this request"""
    session_id: str = Field(default="", max_length=256)
    """requests of one session are placed near each other by policies that know sessions"""
    tenant: str = Field(default="", max_length=256)
    """whose the request is; tenants share what capacity there is when requests wait"""
    priority: int = Field(default=0, ge=-10, le=10)
    """larger is more urgent, while requests wait"""


class StopFields(_Body):
    stop: StopString | StopStringList | None = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class GenerationRequest(SamplingFields, StopFields):
    """What both endpoints take."""

    model: str = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    kvmesh: KvmeshOptions = KvmeshOptions()

    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def session_id(self) -> str:
        return self.kvmesh.session_id or self.prompt_cache_key or self.user or ""


class ContentPart(_Body):
    type: str
    text: str | None = None


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | List[ContentPart] | None = None
    name: str | None = None


class ChatCompletionRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: List[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_INT32_MAX)
    chat_template_kwargs: dict[str, Any] | None = None

    def sampling(self) -> SamplingParams:
        params = super().sampling()
        if self.max_completion_tokens is not None:
            params.max_new_tokens = self.max_completion_tokens
        return params

    def conversation(self) -> list[dict[str, str]]:
        """The messages as chat templates take them."""
        return [_template_message(i, message) for i, message in enumerate(self.messages)]

    def template_args(self) -> dict[str, Any]:
        args = self.chat_template_kwargs or {}
        for name in args:
            if name in _RESERVED_TEMPLATE_ARGS:
                raise unsupported(f"chat_template_kwargs.{name}", "is set by the server; remove it")
        return args


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: str | List[str] | List[TokenId] | List[List[TokenId]]

    def one_prompt(self) -> str | list[int]:
        """The prompt, text or token ids. Raises KvmeshError for none and for more than one."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise unsupported("prompt", "takes one prompt a request; send the others by themselves")
            prompt = prompt[0]
        if not prompt:
            raise invalid("prompt must not be empty", "prompt")
        return prompt


# Known fields that are not supported, with the values that ask for nothing special.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "echo": (False,),
    "suffix": ("",),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "chat_template": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
}

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

Request = TypeVar("Request", bound=BaseModel)


def parse(kind: type[Request], raw: bytes) -> tuple[Request, list[str]]:
    """Validate a body; returns it with the names of the fields that are ignored.

    Raises KvmeshError: INVALID_ARGUMENT with `param`, or UNSUPPORTED for a known field by its name.
    """
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    return validate(kind, body)


def validate(kind: type[Request], body: dict[str, Any]) -> tuple[Request, list[str]]:
    """`parse` for a body already decoded."""
    # `"kvmesh": null` is how typed clients leave it out.
    if body.get("kvmesh", ...) is None:
        del body["kvmesh"]
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise explain_problem(error, body) from None
    ignored = []
    for name, value in (request.model_extra or {}).items():
        neutral = _REFUSED.get(name)
        if neutral is None:
            ignored.append(name)
        elif value is not None and not any(type(value) is type(v) and value == v for v in neutral):
            raise _refusal(name, value)
    return request, ignored


def unsupported(param: str, why: str) -> KvmeshError:
    return KvmeshError(ErrorCode.ERROR_CODE_UNSUPPORTED, f"{param} {why}", param=param)


def _refusal(name: str, value: Any) -> KvmeshError:
    if name == "n" and (type(value) is not int or value < 1):
        return invalid("n must be a positive integer", "n")
    if name == "n":
        return unsupported("n", "must be 1; send more requests for more choices")
    return unsupported(name, "is not supported; remove it")


def _template_message(i: int, message: ChatMessage) -> dict[str, str]:
    place = f"messages[{i}]"
    if message.role in ("tool", "function"):
        raise unsupported(f"{place}.role", f"{message.role!r} is not supported: tools are not")
    for name in ("tool_calls", "function_call", "audio"):
        if (message.model_extra or {}).get(name):
            raise unsupported(f"{place}.{name}", "is not supported; remove it")
    if message.content is None:
        raise invalid(f"{place}.content must be text", f"{place}.content")
    if isinstance(message.content, str):
        content = message.content
    else:
        content = "".join(_text(part, f"{place}.content[{j}]") for j, part in enumerate(message.content))
    # `developer` is the newer name of `system`; templates know the older one.
    role = "system" if message.role == "developer" else message.role
    turn = {"role": role, "content": content}
    if message.name:
        turn["name"] = message.name
    return turn


def _text(part: ContentPart, place: str) -> str:
    if part.type != "text":
        raise unsupported(f"{place}.type", f"{part.type!r} is not supported: the model takes text only")
    if part.text is None:
        raise invalid(f"{place}.text is required", f"{place}.text")
    return part.text
