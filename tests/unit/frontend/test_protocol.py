"""Request bodies: every refusal names the field in the client's words."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.protocol import ChatCompletionRequest, CompletionRequest, parse
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import ReturnHint

INVALID = ErrorCode.ERROR_CODE_INVALID_ARGUMENT
UNSUPPORTED = ErrorCode.ERROR_CODE_UNSUPPORTED
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> tuple[ChatCompletionRequest, list[str]]:
    return parse(ChatCompletionRequest, orjson.dumps({"model": "m", "messages": HELLO, **fields}))


def refused(**fields: Any) -> KvmeshError:
    def use() -> None:
        request, _ = chat(**fields)
        request.check()
        request.sampling()
        request.conversation()
        request.template_args()
        request.constraint()

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
        ("top_p", -0.1),
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
        ("stream_options", {"include_usage": True}),
        ("store", "yes"),
        ("metadata", {str(i): "x" for i in range(17)}),
        ("safety_identifier", "x" * 65),
        ("n", 0),
        ("n", "2"),
        ("n", 129),
        ("logprobs", 3),
        ("top_logprobs", 21),
        ("top_logprobs", 1),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {"²": 1}),
        ("logit_bias", []),
        ("service_tier", "gold"),
        ("reasoning_effort", "extreme"),
        ("verbosity", 3),
        ("tools", {}),
        ("tool_choice", "sometimes"),
        ("tool_choice", "required"),
        ("parallel_tool_calls", "yes"),
        ("continue_final_message", True),
        ("prompt_cache_key", 5),
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
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy", "format": "mp3"}),
        ("web_search_options", {}),
        ("moderation", {"model": "m"}),
        ("echo", True),
        ("best_of", 2),
        ("suffix", "x"),
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
    assert not params.HasField("top_logprobs")
    likeliest = chat(top_p=0, top_k=5)[0].sampling()
    assert (likeliest.HasField("top_p"), likeliest.top_k) == (False, 1)
    request, _ = chat(logprobs=True, top_logprobs=5, logit_bias={"7": -100, "8": 2.5})
    params = request.sampling()
    assert params.top_logprobs == 5
    assert dict(params.logit_bias) == {7: -100, 8: 2.5}


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


def test_a_conversation_with_calls() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    request, _ = chat(
        messages=[
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "content": [{"type": "text", "text": "4"}], "tool_call_id": "call_1"},
            {"role": "assistant", "refusal": "no"},
        ]
    )
    assert request.conversation() == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**call, "function": {"name": "f", "arguments": {"x": 1}}}],
            "reasoning_content": "hm",
        },
        {"role": "tool", "content": "4", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "no"},
    ]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [("", {}), ('{"city": "Pa', {"partial_json": '{"city": "Pa'}), ("?", {"partial_json": "?"})],
)
def test_a_call_that_was_cut_short_does_not_end_its_conversation(arguments: str, given: Any) -> None:
    function = {"name": "f", "arguments": arguments}
    new, former = {"tool_calls": [{"id": "c", "function": function}]}, {"function_call": function}
    for call in (new, former):
        (turn,) = chat(messages=[{"role": "assistant", **call}])[0].conversation()
        assert turn["tool_calls"][0]["function"] == {"name": "f", "arguments": given}


def test_a_null_is_no_parameter() -> None:
    assert chat(prediction=None, audio=None, what=None, other=1)[1] == ["other"]


def test_the_former_spelling_of_a_call_and_its_result() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    request, _ = chat(messages=[*HELLO, call, {"role": "function", "name": "f", "content": "4"}])
    called, result = request.conversation()[1:]
    (made,) = called["tool_calls"]
    assert (called["content"], made["function"]) == ("", {"name": "f", "arguments": {"x": 1}})
    assert result == {"role": "tool", "content": "4", "name": "f", "tool_call_id": made["id"]}


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ({"role": "tool", "content": "4"}, INVALID, "messages[0].tool_call_id"),
        ({"role": "function", "content": "4"}, INVALID, "messages[0].name"),
        (
            {"role": "assistant", "function_call": {"name": "f"}},
            INVALID,
            "messages[0].function_call.arguments",
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "x", "type": "custom"}]},
            UNSUPPORTED,
            "messages[0].tool_calls[0].type",
        ),
    ],
)
def test_bad_calls_name_their_place(message: Any, code: Any, param: str) -> None:
    error = refused(messages=[message])
    assert (error.code, error.param) == (code, param)


def test_what_templates_are_given() -> None:
    request, _ = chat(reasoning_effort="none", verbosity="low", chat_template_kwargs={"verbosity": "high"})
    assert request.template_args() == {
        "reasoning_effort": "none",
        "enable_thinking": False,
        "verbosity": "high",
        "continue_final_message": False,
        "add_generation_prompt": True,
    }
    request, _ = chat(messages=[*HELLO, {"role": "assistant", "content": "The"}], continue_final_message=True)
    request.check()
    args = request.template_args()
    assert (args["continue_final_message"], args["add_generation_prompt"]) == (True, False)


def test_tiers_and_sessions() -> None:
    plain, flex = chat()[0], chat(service_tier="flex", user="me", prompt_cache_key="key")[0]
    own = chat(service_tier="priority", kvmesh={"priority": -3, "session_id": "s"}, safety_identifier="x")[0]
    assert [(r.tier(), r.session_id()) for r in (plain, flex, own)] == [
        ("default", ""),
        ("flex", "key"),
        ("priority", "s"),
    ]
    assert flex.priority() < plain.priority() < chat(service_tier="priority")[0].priority()
    assert own.priority() == -3
    assert chat(safety_identifier="x")[0].session_id() == "x"


def test_what_is_known_of_a_conversations_return() -> None:
    def hint(**fields: Any) -> ReturnHint | None:
        request, _ = chat(**fields)
        request.check()
        return request.return_hint()

    assert hint() is None
    # Whoever asks for it is not yet a conversation.
    assert hint(user="me") is None
    assert hint(kvmesh={"session_id": "s"}) == ReturnHint()
    assert hint(kvmesh={"returns": False}) == ReturnHint(returns=False)
    soon = hint(kvmesh={"returns": True, "returns_in_s": 30})
    assert soon == ReturnHint(returns=True, returns_in_s=30)
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    loop = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "4"},
    ]
    assert hint(tools=tools) is None
    assert hint(tools=tools, tool_choice="required") == ReturnHint(tool_call=True)
    assert hint(tools=tools, messages=loop) == ReturnHint(tool_call=True)
    assert hint(tools=tools, tool_choice="none", messages=loop) is None
    with pytest.raises(KvmeshError, match="of requests that return") as refusal:
        hint(kvmesh={"returns": False, "returns_in_s": 30})
    assert refusal.value.param == "kvmesh.returns_in_s"
    assert refused(kvmesh={"returns_in_s": -1}).param == "kvmesh.returns_in_s"


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"3", b'{"model": NaN}', b"\xff", b"[" * 5000, b'"\\ud800"']
)
def test_malformed_bodies(raw: bytes) -> None:
    with pytest.raises(KvmeshError) as caught:
        parse(ChatCompletionRequest, raw)
    assert caught.value.code == INVALID


def complete(prompt: Any = "x", **fields: Any) -> CompletionRequest:
    request, _ = parse(CompletionRequest, orjson.dumps({"model": "m", "prompt": prompt, **fields}))
    request.check()
    return request


@pytest.mark.parametrize(
    ("prompt", "all_"),
    [
        ("x", ["x"]),
        (["x"], ["x"]),
        (["x", "y"], ["x", "y"]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_prompts(prompt: Any, all_: Any) -> None:
    assert complete(prompt).prompts() == all_


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], None, 3, {"a": 1}, [1, "x"], [1.5], [1, True], ["x", ""]]
)
def test_bad_prompts(prompt: Any) -> None:
    with pytest.raises(KvmeshError) as caught:
        complete(prompt)
    assert caught.value.code == INVALID
    assert (caught.value.param or "").startswith("prompt")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"best_of": 0}, INVALID, "best_of"),
        ({"best_of": 129}, INVALID, "best_of"),
        ({"n": 3, "best_of": 2}, INVALID, "best_of"),
        ({"best_of": 2, "stream": True}, INVALID, "best_of"),
        ({"prompt": ["x"] * 100, "best_of": 100}, INVALID, "prompt"),
        ({"suffix": "end", "echo": True}, INVALID, "suffix"),
        ({"suffix": "end", "prompt": [1, 2]}, INVALID, "suffix"),
        ({"suffix": "", "prompt": ""}, INVALID, "prompt"),
        ({"logprobs": 21}, INVALID, "logprobs"),
        ({"logprobs": True}, INVALID, "logprobs"),
        ({"max_tokens": 0}, INVALID, "max_tokens"),
        ({"prompt": ["x"] * 100, "n": 100}, INVALID, "prompt"),
        ({"tools": [{"type": "function"}]}, UNSUPPORTED, "tools"),
        ({"reasoning_effort": "low"}, UNSUPPORTED, "reasoning_effort"),
    ],
)
def test_bad_completions(fields: dict[str, Any], code: Any, param: str) -> None:
    with pytest.raises(KvmeshError) as caught:
        complete(**fields)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_what_completions_ask_an_engine_for() -> None:
    plain, scored = complete().sampling(), complete(logprobs=0, echo=True, max_tokens=0).sampling()
    assert not plain.HasField("top_logprobs")
    assert (scored.HasField("top_logprobs"), scored.top_logprobs, scored.prompt_logprobs) == (True, 0, True)
    assert scored.max_new_tokens == 1
    assert not complete(logprobs=2).sampling().prompt_logprobs
    # As many as are wanted are not judged.
    same, judged = complete(n=2, best_of=2, suffix="", stream=True), complete(n=2, best_of=3)
    assert (same.wanted(), same.drawn(), same.sampling().HasField("top_logprobs")) == (2, 2, False)
    assert (judged.wanted(), judged.drawn(), judged.sampling().HasField("top_logprobs")) == (2, 3, True)
    assert (judged.shows_scores(), complete(best_of=3, logprobs=0).shows_scores()) == (False, True)


def test_millions_of_bad_items_make_one_error() -> None:
    raw = orjson.dumps({"model": "m", "prompt": [1, *(["x"] * 500_000)]})
    with pytest.raises(KvmeshError) as caught:
        parse(CompletionRequest, raw)
    assert len(caught.value.message) < 500
