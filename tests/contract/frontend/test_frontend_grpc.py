"""FrontendService: the same as REST."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from fixtures.frontend import (
    ANSWER,
    MODEL,
    Split,
    endless,
)
from kvmesh.common.errors import KvmeshError
from kvmesh.v1.engine_pb2 import SamplingParams
from kvmesh.v1.frontend_pb2 import ChatMessage, ChatRequest, FrontendServiceGenerateRequest, ListModelsRequest


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


async def test_grpc_generate(split: Split, answer_ids: list[int]) -> None:
    request = FrontendServiceGenerateRequest(token_ids=[5, 6, 7], sampling=SamplingParams(max_new_tokens=4))
    responses = [response async for response in split.front.grpc.Generate(request)]
    assert [token for r in responses for token in r.token_ids] == answer_ids[:4]
    assert responses[-1].finish_reason == "length"
    assert not responses[-1].HasField("kvmesh")
    models = (await split.front.grpc.ListModels(ListModelsRequest())).models
    assert [model.name for model in models] == [MODEL]


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
