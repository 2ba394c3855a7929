"""FrontendService: the same as REST."""

from __future__ import annotations

from typing import Any

import grpc
import orjson
import pytest
from tokenizers import Tokenizer

from fixtures.frontend import (
    ANSWER,
    MODEL,
    Serve,
    Split,
    endless,
)
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.engine_pb2 import Constraint, SamplingParams
from kvmesh.v1.frontend_pb2 import (
    ChatMessage,
    ChatRequest,
    CompleteRequest,
    FrontendServiceGenerateRequest,
    ListModelsRequest,
    Prompt,
    RequestOptions,
    Tool,
    ToolCall,
)
from kvmesh.v1.router_pb2 import ReturnHint


async def test_grpc_chat(split: Split) -> None:
    request = ChatRequest(
        model="default",
        messages=[ChatMessage(role="user", content="hello")],
        sampling=SamplingParams(temperature=0, max_new_tokens=100),
        explain=True,
    )
    responses = [response async for response in split.front.grpc.Chat(request)]
    assert "".join(r.text for r in responses) == ANSWER
    last = responses[-1]
    assert last.finish_reason == "stop"
    assert last.usage.cached.device == 16
    assert (last.kvmesh.mode, last.kvmesh.prefill, last.kvmesh.decode) == (
        "disaggregated",
        "prefill-0",
        "decode-0",
    )
    await split.idle()


async def test_a_stored_grpc_chat_is_read_over_rest(split: Split) -> None:
    request = ChatRequest(
        model="default",
        messages=[ChatMessage(role="user", content="hello")],
        store=True,
        metadata={"a": "b"},
        n=2,
    )
    ids = [response.stored_id async for response in split.front.grpc.Chat(request)]
    assert not any(ids[:-1])
    kept: Any = await split.front.openai.chat.completions.retrieve(ids[-1])
    assert [choice.message.content for choice in kept.choices] == [ANSWER, ANSWER]
    assert kept.metadata == {"a": "b"}
    await split.idle()


async def test_grpc_generate(split: Split, answer_ids: list[int]) -> None:
    request = FrontendServiceGenerateRequest(token_ids=[5, 6, 7], sampling=SamplingParams(max_new_tokens=4))
    responses = [response async for response in split.front.grpc.Generate(request)]
    assert [token for r in responses for token in r.token_ids] == answer_ids[:4]
    assert responses[-1].finish_reason == "length"
    assert not responses[-1].HasField("kvmesh")
    models = (await split.front.grpc.ListModels(ListModelsRequest())).models
    assert [model.name for model in models] == [MODEL]


def user(content: str = "x") -> ChatMessage:
    return ChatMessage(role="user", content=content)


async def test_grpc_chat_offers_what_rest_does(split: Split, answer_ids: list[int]) -> None:
    request = ChatRequest(
        messages=[
            user("hello"),
            ChatMessage(role="assistant", tool_calls=[ToolCall(id="c", name="f", arguments="{}")]),
            ChatMessage(role="tool", content="4", tool_call_id="c"),
        ],
        sampling=SamplingParams(seed=3, top_logprobs=1, logit_bias={5: -1}, temperature=0),
        n=2,
        tools=[Tool(name="f", parameters='{"type": "object"}')],
        tool_choice="none",
        options=RequestOptions(
            service_tier="flex",
            safety_identifier="me",
            priority=0,
            policy="random",
            returns=True,
            returns_in_s=2.5,
            deadline_ms=20_000,
        ),
    )
    responses = [response async for response in split.front.grpc.Chat(request)]
    for index in (0, 1):
        mine = [response for response in responses if response.index == index]
        assert "".join(response.text for response in mine) == ANSWER
        scores = [score for response in mine for score in response.logprobs]
        assert b"".join(score.token for score in scores) == ANSWER.encode()
        assert mine[-1].finish_reason == "stop"
    assert [response.HasField("usage") for response in responses[-2:]] == [False, True]
    assert sorted(received.sampling.seed for received in split.decode.received) == [3, 4]
    assert dict(split.decode.received[0].sampling.logit_bias) == {5: -1}
    route = split.front.router.requests[0]
    assert (route.priority, route.session_id, route.policy) == (0, "me", "random")
    assert route.hint == ReturnHint(returns=True, returns_in_s=2.5)
    assert 10_000 < route.deadline_ms <= 20_000
    await split.idle()


async def test_grpc_calls(split: Split, tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode('{"a": 1}', add_special_tokens=False).ids, 2]
    split.prefill.script = split.decode.script = lambda _: ids
    request = ChatRequest(messages=[user()], tools=[Tool(name="f")], tool_name="f")
    responses = [response async for response in split.front.grpc.Chat(request)]
    calls = [call for response in responses for call in response.tool_calls]
    assert calls[0].name == "f"
    assert "".join(call.arguments for call in calls) == '{"a": 1}'
    assert responses[-1].finish_reason == "tool_calls"
    await split.idle()


async def trailers(call: Any) -> dict[str, Any]:
    async for _ in call:
        pass
    return dict(await call.trailing_metadata())


async def test_grpc_tools_may_be_strict_and_few(serve: Serve) -> None:
    schema = '{"type": "object", "properties": {"x": {"type": "integer"}}}'
    request = ChatRequest(
        messages=[user()],
        tools=[Tool(name="f", parameters=schema, strict=True), Tool(name="g")],
        allowed_tools=["f"],
    )
    async with serve("hello", "qwen") as split:
        assert "x-kvmesh-ignored-params" not in await trailers(split.front.grpc.Chat(request))
        (structure,) = orjson.loads(split.decode.received[0].sampling.constraint.structural_tag)["structures"]
        assert structure["schema"] == orjson.loads(schema)
    async with serve("hello", "mistral") as split:
        assert (await trailers(split.front.grpc.Chat(request)))["x-kvmesh-ignored-params"] == "strict"


async def test_grpc_names_what_it_ignores(split: Split) -> None:
    request = ChatRequest(messages=[user()], metadata={"a": "b"})
    assert (await trailers(split.front.grpc.Chat(request)))["x-kvmesh-ignored-params"] == "metadata"
    await split.idle()


async def test_grpc_complete(split: Split, tokenizer: Tokenizer, answer_ids: list[int]) -> None:
    request = CompleteRequest(
        prompts=[Prompt(text="Once"), Prompt(text="Twice")],
        sampling=SamplingParams(max_new_tokens=2, top_logprobs=0),
        echo=True,
        n=2,
    )
    responses = [response async for response in split.front.grpc.Complete(request)]
    texts = ["".join(r.text for r in responses if r.index == index) for index in range(4)]
    answer = tokenizer.decode(answer_ids[:2])
    assert texts == [prompt + answer for prompt in ("Once", "Once", "Twice", "Twice")]
    assert not responses[0].logprobs[0].HasField("logprob")
    assert responses[-1].usage.completion_tokens == 8
    await split.idle()


async def test_grpc_generate_with_log_probabilities(split: Split) -> None:
    sampling = SamplingParams(max_new_tokens=3, top_logprobs=1, prompt_logprobs=True)
    request = FrontendServiceGenerateRequest(token_ids=[5, 6, 7], sampling=sampling)
    responses = [response async for response in split.front.grpc.Generate(request)]
    assert len(responses[0].prompt_logprobs) == 2
    assert sum(len(response.logprobs) for response in responses) == 3
    await split.idle()


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (CompleteRequest(), "prompts"),
        (CompleteRequest(prompts=[Prompt()]), "prompts"),
        (CompleteRequest(prompts=[Prompt(text="")]), "prompts"),
        (
            CompleteRequest(prompts=[Prompt(text="x")], options=RequestOptions(service_tier="gold")),
            "options.service_tier",
        ),
        (
            CompleteRequest(
                prompts=[Prompt(text="x")],
                sampling=SamplingParams(constraint=Constraint(json_schema="{")),
            ),
            "sampling.constraint.json_schema",
        ),
        (
            CompleteRequest(prompts=[Prompt(text="x")], sampling=SamplingParams(top_logprobs=30)),
            "sampling.top_logprobs",
        ),
    ],
)
async def test_grpc_completion_errors(split: Split, request_: CompleteRequest, param: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [r async for r in split.front.grpc.Complete(request_)]
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert KvmeshError.from_rpc(caught.value, "frontend").param == param
    await split.idle()


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (ChatRequest(), grpc.StatusCode.INVALID_ARGUMENT, "messages"),
        (
            ChatRequest(messages=[ChatMessage(role="robot")]),
            grpc.StatusCode.INVALID_ARGUMENT,
            "messages[0].role",
        ),
        (
            ChatRequest(
                messages=[ChatMessage(role="user", content="x")], sampling=SamplingParams(temperature=7)
            ),
            grpc.StatusCode.INVALID_ARGUMENT,
            "sampling.temperature",
        ),
        (
            ChatRequest(
                messages=[ChatMessage(role="user", content="x")], sampling=SamplingParams(max_new_tokens=0)
            ),
            grpc.StatusCode.INVALID_ARGUMENT,
            "sampling.max_new_tokens",
        ),
        (
            ChatRequest(model="gpt-5", messages=[ChatMessage(role="user", content="x")]),
            grpc.StatusCode.NOT_FOUND,
            "model",
        ),
    ],
)
async def test_grpc_errors(split: Split, request_: ChatRequest, code: grpc.StatusCode, param: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [r async for r in split.front.grpc.Chat(request_)]
    assert caught.value.code() == code
    assert KvmeshError.from_rpc(caught.value, "frontend").param == param
    await split.idle()


async def drain(call: Any) -> None:
    while await call.read():
        pass


@pytest.mark.parametrize("end", ["cancel", "deadline"])
async def test_grpc_client_that_leaves(split: Split, end: str) -> None:
    split.decode.script = endless
    split.decode.step_s = 0.01
    request = ChatRequest(messages=[ChatMessage(role="user", content="hello")])
    call = split.front.grpc.Chat(request, timeout=0.5 if end == "deadline" else None)
    await call.read()
    if end == "cancel":
        call.cancel()
    else:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drain(call)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await split.idle()
    assert split.decode.cancelled
