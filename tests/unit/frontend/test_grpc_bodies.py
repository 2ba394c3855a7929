"""gRPC requests offer what REST's bodies do: no field is missing, and none is lost on the way."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import Message
from pydantic import BaseModel

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.frontend.grpc.bodies import (
    chat_body,
    completion_body,
    embedding_body,
    proto_names,
    tokens_body,
)
from kvmesh.frontend.protocol import ChatCompletionRequest, CompletionRequest, EmbeddingRequest
from kvmesh.frontend.protocol.generation import KvmeshOptions
from kvmesh.frontend.protocol.messages import ChatMessage as RestMessage
from kvmesh.frontend.protocol.tools import Function
from kvmesh.v1.engine_pb2 import Constraint, SamplingParams
from kvmesh.v1.frontend_pb2 import (
    ChatMessage,
    ChatRequest,
    CompleteRequest,
    EmbedRequest,
    Prompt,
    RequestOptions,
    Tool,
    ToolCall,
)

# REST's fields that gRPC has no field of that name for, and why.
CONSTRAINTS = dict.fromkeys(
    (
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
    ),
    "sampling.constraint has what they can say",
)
EVERYWHERE = {
    "session": "options.session_id",
    "kvmesh": "options and explain",
    "max_tokens": "sampling.max_new_tokens",
    "min_tokens": "sampling.min_new_tokens",
    "logprobs": "sampling.top_logprobs",
    "stream": "every answer is a stream",
    "stream_options": "the last response always has the usage",
}
CHAT = {
    "max_completion_tokens": "sampling.max_new_tokens",
    "functions": "the former spelling of tools",
    "function_call": "the former spelling of tool_choice",
    "modalities": "answers are text",
}
COMPLETION = {
    "prompt": "prompts",
    "best_of": "streams are not judged",
}
# Of gRPC's, without one of that name in REST, and why.
SAMPLING = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "constraint": "its kinds are fields of their own",
    "prompt_logprobs": "echo with logprobs",
}
OURS = {"sampling": "its fields", "options": "its fields"}
PAIRS: list[tuple[type[BaseModel], list[type[Message]], dict[str, str], dict[str, str]]] = [
    (
        ChatCompletionRequest,
        [ChatRequest, SamplingParams, Constraint, RequestOptions],
        CONSTRAINTS | EVERYWHERE | CHAT,
        SAMPLING | OURS | {"tool_name": "tool_choice", "allowed_tools": "tool_choice"},
    ),
    (
        CompletionRequest,
        [CompleteRequest, SamplingParams, Constraint, RequestOptions],
        CONSTRAINTS | EVERYWHERE | COMPLETION,
        SAMPLING | OURS | {"prompts": "prompt", "top_logprobs": "logprobs"},
    ),
    (
        EmbeddingRequest,
        [EmbedRequest],
        {"input": "inputs", "encoding_format": "numbers are floats", "kvmesh": "options"},
        {"inputs": "input", "options": "its fields"},
    ),
    (
        RestMessage,
        [ChatMessage],
        {"function_call": "the former spelling of tool_calls", "refusal": "content says it as well"},
        {},
    ),
    (Function, [Tool], {}, {}),
]


def proto_fields(*kinds: type[Message]) -> set[str]:
    return {field.name for kind in kinds for field in kind.DESCRIPTOR.fields}


@pytest.mark.parametrize(
    ("rest", "protos", "rest_only", "grpc_only"), PAIRS, ids=lambda v: getattr(v, "__name__", "")
)
def test_grpc_has_the_fields_that_rest_has(
    rest: type[BaseModel],
    protos: list[type[Message]],
    rest_only: dict[str, str],
    grpc_only: dict[str, str],
) -> None:
    options = KvmeshOptions.model_fields if RequestOptions in protos else ()
    mine = {field.alias or name for name, field in rest.model_fields.items()} | set(options)
    theirs = proto_fields(*protos)
    assert mine - theirs == rest_only.keys()
    assert theirs - mine == grpc_only.keys()


def full(message: Message, *but: str) -> Any:
    """Fail unless every field of it is set, and of its messages likewise."""
    for field in message.DESCRIPTOR.fields:
        if field.name not in but:
            assert field.name in {set_.name for set_, _ in message.ListFields()}, field.full_name
    return message


SAMPLED = full(
    SamplingParams(
        temperature=0.5,
        top_p=0.5,
        top_k=3,
        min_p=0.25,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        repetition_penalty=1.5,
        max_new_tokens=9,
        min_new_tokens=2,
        stop_token_ids=[7],
        ignore_eos=True,
        seed=3,
        logit_bias={5: -1},
        constraint=Constraint(regex="a+"),
        top_logprobs=4,
        prompt_logprobs=True,
    )
)
OPTIONS = full(
    RequestOptions(
        policy="random",
        session_id="s",
        tenant="t",
        priority=-3,
        service_tier="flex",
        prompt_cache_key="k",
        safety_identifier="i",
        returns=True,
        returns_in_s=2.5,
        deadline_ms=900,
    )
)
SAMPLED_BODY: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.25,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "repetition_penalty": 1.5,
    "max_tokens": 9,
    "min_tokens": 2,
    "stop_token_ids": [7],
    "ignore_eos": True,
    "seed": 3,
    "logit_bias": {"5": -1.0},
    "regex": "a+",
}
KVMESH: dict[str, Any] = {
    "policy": "random",
    "session_id": "s",
    "tenant": "t",
    "priority": -3,
    "returns": True,
    "returns_in_s": 2.5,
    "deadline_ms": 900,
}
ASKER = {"user": "u", "service_tier": "flex", "prompt_cache_key": "k", "safety_identifier": "i"}


def test_nothing_of_a_chat_is_lost() -> None:
    request = ChatRequest(
        model="m",
        messages=[
            ChatMessage(role="user", content="hello", name="me"),
            full(
                ChatMessage(
                    role="assistant",
                    content="well",
                    name="it",
                    tool_calls=[full(ToolCall(id="c", name="f", arguments="{}"))],
                    tool_call_id="x",
                    reasoning_content="hm",
                )
            ),
        ],
        sampling=SAMPLED,
        stop=["."],
        explain=True,
        user="u",
        n=2,
        tools=[full(Tool(name="f", description="d", parameters='{"type": "object"}', strict=True))],
        tool_choice="required",
        allowed_tools=["f"],
        parallel_tool_calls=False,
        continue_final_message=True,
        add_generation_prompt=False,
        reasoning_effort="low",
        verbosity="high",
        chat_template_kwargs='{"a": 1}',
        options=OPTIONS,
        store=True,
        metadata={"a": "b"},
    )
    body = chat_body(full(request, "tool_name"))
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    named = {"type": "function", "function": {"name": "f"}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {"tool_calls": [call], "tool_call_id": "x", "reasoning_content": "hm"}
    assert body.model_dump(exclude_unset=True) == {
        **SAMPLED_BODY,
        **ASKER,
        "model": "m",
        "messages": [
            {"role": "user", "content": "hello", "name": "me"},
            {"role": "assistant", "content": "well", "name": "it", **said},
        ],
        "stop": ["."],
        "n": 2,
        "logprobs": True,
        "top_logprobs": 4,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}},
        "parallel_tool_calls": False,
        "continue_final_message": True,
        "add_generation_prompt": False,
        "reasoning_effort": "low",
        "verbosity": "high",
        "chat_template_kwargs": {"a": 1},
        "store": True,
        "metadata": {"a": "b"},
        "kvmesh": {**KVMESH, "explain": True},
    }
    chosen = chat_body(ChatRequest(messages=[ChatMessage(role="user", content="x")], tool_name="f"))
    assert chosen.model_dump(exclude_unset=True)["tool_choice"] == named


def test_nothing_of_a_completion_is_lost() -> None:
    request = CompleteRequest(
        model="m",
        prompts=[Prompt(text="a"), Prompt(text="b")],
        sampling=SAMPLED,
        stop=["."],
        explain=True,
        user="u",
        n=2,
        echo=True,
        suffix="c",
        options=OPTIONS,
    )
    assert completion_body(full(request)).model_dump(exclude_unset=True) == {
        **SAMPLED_BODY,
        **ASKER,
        "model": "m",
        "prompt": ["a", "b"],
        "stop": ["."],
        "n": 2,
        "echo": True,
        "suffix": "c",
        "logprobs": 4,
        "kvmesh": {**KVMESH, "explain": True},
    }


def test_nothing_of_inputs_is_lost() -> None:
    options = RequestOptions(**KVMESH)
    request = EmbedRequest(model="m", inputs=[Prompt(text="a")], dimensions=3, user="u", options=options)
    assert embedding_body(full(request)).model_dump(exclude_unset=True) == {
        "model": "m",
        "input": ["a"],
        "dimensions": 3,
        "user": "u",
        "kvmesh": {**KVMESH, "explain": False},
    }


@pytest.mark.parametrize(
    ("name", "proto"),
    [
        ("prompt", "prompts"),
        ("prompt[1][0]", "prompts[1][0]"),
        ("input", "inputs"),
        ("inputs", "inputs"),
        ("prompt_cache_key", "options.prompt_cache_key"),
        ("token_ids", "token_ids"),
    ],
)
def test_errors_are_named_once(name: str, proto: str) -> None:
    with pytest.raises(KvmeshError) as caught, proto_names():
        raise invalid(f"{name} is wrong", name)
    assert (caught.value.param, caught.value.message) == (proto, f"{proto} is wrong")


def test_token_ids_that_are_missing_are_named() -> None:
    with pytest.raises(KvmeshError) as caught, proto_names():
        tokens_body([], "", SamplingParams(), RequestOptions(), False)
    assert (caught.value.param, caught.value.message) == ("token_ids", "token_ids must not be empty")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_tools": ["f"], "tool_choice": "none"}, "allowed_tools"),
        ({"allowed_tools": ["f"], "tool_name": "f"}, "allowed_tools"),
        ({"allowed_tools": ["g"], "tools": [Tool(name="f")]}, "tool_choice"),
        ({"tools": [Tool(name="no name")]}, "tools[0].name"),
        ({"tools": [Tool(name="f", parameters="{")]}, "tools[0].parameters"),
    ],
)
def test_fields_of_tools_are_named_as_the_proto_does(fields: dict[str, Any], param: str) -> None:
    request = ChatRequest(messages=[ChatMessage(role="user", content="x")], **fields)
    with pytest.raises(KvmeshError) as caught, proto_names():
        chat_body(request).check()
    assert caught.value.param == param
