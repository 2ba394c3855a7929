"""Steps of workers' messages, read as protobuf's own reader reads them."""

from __future__ import annotations

import random

import pytest

from kvmesh.core import read_steps
from kvmesh.v1.common_pb2 import CachedTokens
from kvmesh.v1.engine_pb2 import (
    FINISH_REASON_STOP,
    EngineTiming,
    Finish,
    GenerateResponse,
    PrefillResponse,
    RequestStep,
    TokenLogprob,
)


def test_steps_of_tokens_alone_are_read_whole() -> None:
    steps = [
        RequestStep(id=1, token_ids=[0, 127, 128, 2**32 - 1]),
        RequestStep(id=2**63 + 5),
        RequestStep(token_ids=[7]),
    ]
    for kind in (GenerateResponse, PrefillResponse):
        read = read_steps(kind(steps=steps).SerializeToString())
        assert read == [(1, [0, 127, 128, 2**32 - 1], None), (2**63 + 5, [], None), (0, [7], None)]
    assert read_steps(b"") == []


@pytest.mark.parametrize(
    "more",
    [
        {"finish": Finish(reason=FINISH_REASON_STOP)},
        {"finish": Finish()},
        {"cached": CachedTokens()},
        {"timing": EngineTiming()},
        {"logprobs": [TokenLogprob(logprob=-1.5)]},
        {"prompt_logprobs": [TokenLogprob()]},
        {"embedding": [0.5, 1.0]},
    ],
)
def test_steps_that_say_more_come_as_they_are(more: dict[str, object]) -> None:
    step = RequestStep(id=3, token_ids=[5, 600], **more)  # type: ignore[arg-type]
    other = RequestStep(id=4, token_ids=[1])
    message = GenerateResponse(steps=[step, other]).SerializeToString()
    assert read_steps(message) == [(3, [5, 600], step.SerializeToString()), (4, [1], None)]
    (_, _, whole), _ = read_steps(message)
    assert whole is not None
    assert RequestStep.FromString(whole) == step


def test_tokens_that_are_not_packed_are_read() -> None:
    # Field 2 as single integers, and a field of a later version.
    step = b"\x08\x09" + b"\x10\x05" + b"\x10\x86\x01" + b"\x7d\x00\x00\x00\x00"
    assert read_steps(b"\x0a" + bytes([len(step)]) + step) == [(9, [5, 134], step)]
    assert RequestStep.FromString(step).token_ids == [5, 134]


def test_what_is_no_message_of_steps_is_refused() -> None:
    whole = GenerateResponse(steps=[RequestStep(id=300, token_ids=[5, 600])]).SerializeToString()
    for end in range(1, len(whole)):
        with pytest.raises(ValueError, match="not a message of steps"):
            read_steps(whole[:end])
    for bad in (b"\x0a", b"\x0b", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x0d\x00"):
        with pytest.raises(ValueError, match="not a message of steps"):
            read_steps(bad)
    drawn = random.Random(5)
    for _ in range(2_000):
        broken = bytearray(whole)
        broken[drawn.randrange(len(whole))] = drawn.randrange(256)
        try:
            read_steps(bytes(broken))
        except ValueError:
            continue
