"""Request bodies: every refusal names the field in the client's words."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.protocol import ChatCompletionRequest, CompletionRequest, parse
from kvmesh.v1.errors_pb2 import ErrorCode

INVALID = ErrorCode.ERROR_CODE_INVALID_ARGUMENT
UNSUPPORTED = ErrorCode.ERROR_CODE_UNSUPPORTED
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> tuple[ChatCompletionRequest, list[str]]:
    return parse(ChatCompletionRequest, orjson.dumps({"model": "m", "messages": HELLO, **fields}))


def refused(**fields: Any) -> KvmeshError:
    def use() -> None:
        request, _ = chat(**fields)
        request.conversation()
        request.template_args()

    with pytest.raises(KvmeshError) as caught:
        use()
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 7),
        ("model", ""),
        ("model", None),
        ("messages", []),
        ("messages", None),
        ("messages", "hello"),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", "0.5"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -2.5),
        ("repetition_penalty", 0),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", 2**40),
        ("max_completion_tokens", -1),
        ("min_tokens", -1),
        ("seed", 1.5),
        ("seed", "x"),
        ("stop", 3),
        ("stop", ""),
        ("stop", ["x"] * 17),
        ("stream", "yes"),
        ("stream_options", True),
        ("n", 0),
        ("n", "2"),
        ("kvmesh", 1),
        ("chat_template_kwargs", []),
    ],
)
def test_bad_values_name_their_field(field: str, value: Any) -> None:
    error = refused(**{field: value})
    assert (error.code, error.param) == (INVALID, field)
    assert field in error.message
    assert not error.message.endswith(".")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([*HELLO, {"role": "user", "content": 3}], "messages[1].content"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "assistant", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        (["x"], "messages[0]"),
    ],
)
def test_bad_messages_name_their_place(messages: Any, param: str) -> None:
    error = refused(messages=messages)
    assert (error.code, error.param) == (INVALID, param)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("logit_bias", {"5": 1}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("store", True),
        ("service_tier", "flex"),
        ("reasoning_effort", "high"),
        ("chat_template", "{{ 1 }}"),
    ],
)
def test_known_but_unsupported_are_refused_by_name(field: str, value: Any) -> None:
    error = refused(**{field: value})
    assert (error.code, error.param) == (UNSUPPORTED, field)


def test_image_parts_are_refused() -> None:
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    error = refused(messages=[{"role": "user", "content": parts}])
    assert (error.code, error.param) == (UNSUPPORTED, "messages[0].content[1].type")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1),
        ("n", None),
        ("tools", []),
        ("tools", None),
        ("logprobs", False),
        ("response_format", {"type": "text"}),
        ("store", False),
        ("kvmesh", None),
        ("stop", None),
        ("temperature", None),
        ("user", "me"),
    ],
)
def test_values_that_ask_for_nothing_special_pass(field: str, value: Any) -> None:
    _, ignored = chat(**{field: value})
    assert ignored == []


def test_unknown_fields_are_reported() -> None:
    _, ignored = chat(use_beam_search=False, top_a=1)
    assert ignored == ["use_beam_search", "top_a"]


def test_unknown_kvmesh_fields_are_refused() -> None:
    error = refused(kvmesh={"explian": True})
    assert (error.code, error.param) == (INVALID, "kvmesh.explian")


def test_sampling_reaches_the_engine() -> None:
    request, _ = chat(
        temperature=0, top_p=0.5, top_k=0, seed=-1, max_tokens=7, max_completion_tokens=9, presence_penalty=1
    )
    params = request.sampling()
    assert params.HasField("temperature")
    assert params.temperature == 0
    assert not params.HasField("top_k")
    assert params.seed == 2**63 - 1
    assert params.max_new_tokens == 9
    assert params.presence_penalty == 1
    assert not params.HasField("frequency_penalty")


def test_conversation() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request, _ = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts, "name": "Ann"},
        ]
    )
    assert request.conversation() == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab", "name": "Ann"},
    ]


def test_tool_messages_are_refused() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}
    assert refused(messages=[call]).param == "messages[0].tool_calls"
    assert refused(messages=[{"role": "tool", "content": "4"}]).param == "messages[0].role"


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"3", b'{"model": NaN}', b"\xff", b"[" * 5000, b'"\\ud800"']
)
def test_malformed_bodies(raw: bytes) -> None:
    with pytest.raises(KvmeshError) as caught:
        parse(ChatCompletionRequest, raw)
    assert caught.value.code == INVALID


@pytest.mark.parametrize(("prompt", "one"), [("x", "x"), (["x"], "x"), ([5, 6], [5, 6]), ([[5, 6]], [5, 6])])
def test_prompts(prompt: Any, one: Any) -> None:
    request, _ = parse(CompletionRequest, orjson.dumps({"model": "m", "prompt": prompt}))
    assert request.one_prompt() == one


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], None, 3, {"a": 1}, [-1], [1, "x"], [1.5]])
def test_bad_prompts(prompt: Any) -> None:
    with pytest.raises(KvmeshError) as caught:
        parse(CompletionRequest, orjson.dumps({"model": "m", "prompt": prompt}))[0].one_prompt()
    assert caught.value.code == INVALID
    assert (caught.value.param or "").startswith("prompt")


def test_several_prompts_are_refused() -> None:
    request, _ = parse(CompletionRequest, orjson.dumps({"model": "m", "prompt": ["a", "b"]}))
    with pytest.raises(KvmeshError) as caught:
        request.one_prompt()
    assert (caught.value.code, caught.value.param) == (UNSUPPORTED, "prompt")


def test_millions_of_bad_items_make_one_error() -> None:
    raw = orjson.dumps({"model": "m", "prompt": [1, *(["x"] * 500_000)]})
    with pytest.raises(KvmeshError) as caught:
        parse(CompletionRequest, raw)
    assert len(caught.value.message) < 500
