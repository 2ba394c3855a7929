"""Why requests end, from SGLang's words."""

from __future__ import annotations

import pytest

from kvmesh.engine.contract import Finish, FinishReason
from kvmesh.engine.sglang.finishes import CANCELLED, aborted, finish_of
from kvmesh.v1.errors_pb2 import ErrorCode


def test_a_request_that_goes_on_has_no_finish() -> None:
    assert finish_of(None, aborting=False) is None
    assert finish_of(None, aborting=True) is None


def test_normal_ends() -> None:
    assert finish_of({"type": "length", "length": 4}, aborting=False) == Finish(FinishReason.LENGTH)
    stop = finish_of({"type": "stop", "matched": 2}, aborting=False)
    assert stop == Finish(FinishReason.STOP, matched_token_id=2)
    # A request may end by itself while its abort is under way.
    assert finish_of({"type": "stop", "matched": 2}, aborting=True) == stop


def test_an_abort_of_ours_is_a_cancellation_whatever_sglang_calls_it() -> None:
    failure = {"type": "abort", "message": "Decode handshake failed", "status_code": 500}
    assert finish_of(failure, aborting=True) == CANCELLED
    assert aborted(None, aborting=True) == CANCELLED


def test_the_other_half_giving_up_is_a_cancellation() -> None:
    message = "Prefill transfer failed for request: Aborted by decode-side abort notification."
    assert finish_of({"type": "abort", "message": message, "status_code": 500}, aborting=False) == CANCELLED


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        (400, "Input is too long.", ErrorCode.ERROR_CODE_INVALID_ARGUMENT),
        (503, "The queue is full.", ErrorCode.ERROR_CODE_OVERLOADED),
        (500, "Decode handshake failed for request rank=0", ErrorCode.ERROR_CODE_UNAVAILABLE),
        (500, "KV checksum mismatch", ErrorCode.ERROR_CODE_ENGINE_FAILED),
        (503, "External KV cache load failed", ErrorCode.ERROR_CODE_DATA_CORRUPTED),
        (None, "", ErrorCode.ERROR_CODE_ENGINE_FAILED),
    ],
)
def test_other_aborts_are_errors_by_status(status: int | None, message: str, code: ErrorCode) -> None:
    finish = aborted({"type": "abort", "message": message, "status_code": status}, aborting=False)
    assert finish.reason is FinishReason.ERROR
    assert finish.error is not None
    assert finish.error.code == code
    assert not finish.error.message.endswith(".")
    assert finish.error.message[0].islower() or finish.error.message.startswith("kV")


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (
            "Failed to compile json grammar: [20:19:31] /p/cpp/schema.cc:41: enum array must not be empty\n",
            "enum array must not be empty",
        ),
        ("Failed to compile regex grammar: Invalid regex: NUL bytes", "NUL bytes"),
        ("Failed to compile structural_tag grammar: Grammar compilation failed: ", "it is malformed"),
        (
            "Grammar preprocessing timed out: req.grammar_key=('regex', 'a')",
            "it takes too long to compile",
        ),
        (
            "Grammar accept_token failed for req 1 with token 0: Tokens not accepted: 0\nKey string: root",
            "it allows no answer",
        ),
    ],
)
def test_a_constraint_that_cannot_be_kept_is_the_clients_fault(message: str, problem: str) -> None:
    finish = finish_of({"type": "abort", "message": message, "status_code": 500}, aborting=False)
    assert finish is not None
    assert finish.error is not None
    assert (finish.error.code, finish.error.param) == (ErrorCode.ERROR_CODE_INVALID_ARGUMENT, "constraint")
    assert finish.error.message == f"the constraint cannot be kept: {problem}"
