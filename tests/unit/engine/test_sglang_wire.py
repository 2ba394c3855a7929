"""SGLang's wire, from layouts like the ones its launcher reports."""

from __future__ import annotations

import base64
import copy
from array import array
from typing import Any

import msgspec
import pytest
from msgspec.msgpack import Ext

from kvmesh.common.errors import KvmeshError
from kvmesh.engine.contract import Logprob
from kvmesh.engine.sglang.wire import Wire
from kvmesh.v1.errors_pb2 import ErrorCode

# An empty array of 64-bit integers, as SGLang packs it: length of the type, the type, the integers.
EMPTY = Ext(1, b"\x00\x00\x00\x02\xa1q")
OUTPUTS = [
    "rids",
    "http_worker_ipcs",
    "finished_reasons",
    "decoded_texts",
    "output_ids",
    "cached_tokens",
    "input_token_logprobs_val",
    "input_token_logprobs_idx",
    "output_token_logprobs_val",
    "input_top_logprobs_val",
    "input_top_logprobs_idx",
    "output_top_logprobs_val",
    "output_top_logprobs_idx",
    "cached_tokens_details",
    "time_stats",
    "image_tokens",
]


def packed(*token_ids: int) -> Ext:
    return Ext(1, bytes(EMPTY.data) + array("q", token_ids).tobytes())


def template(name: str, **fields: Any) -> dict[str, Any]:
    message = base64.b64encode(msgspec.msgpack.encode([name, *fields.values()]))
    return {"fields": list(fields), "message": message.decode()}


LAYOUT = {
    "request": template(
        "TokenizedGenerateReqInput",
        rid="",
        http_worker_ipc=None,
        input_ids=EMPTY,
        sampling_params=[128, 1.0, None],
        stream=True,
        bootstrap_room=None,
    ),
    "sampling_fields": ["max_new_tokens", "temperature", "sampling_seed"],
    "abort": template("AbortReq", rid="", http_worker_ipc=None, abort_all=False, finished_reason=None),
    "flush": template("FlushCacheReqInput", rid=None, http_worker_ipc=None, timeout_s=None),
    "outputs": OUTPUTS,
    "embedding": template("TokenizedEmbeddingReqInput", rid="", input_ids=EMPTY, sampling_params=[0]),
    "embeddings": ["rids", "finished_reasons", "embeddings", "prompt_tokens", "cached_tokens", "time_stats"],
    "flushed": ["rid", "http_worker_ipc", "success", "message"],
}


@pytest.fixture
def wire() -> Wire:
    return Wire(LAYOUT)


def outputs(**fields: Any) -> bytes:
    known: dict[str, Any] = {
        "rids": ["a", "b"],
        "http_worker_ipcs": [None, None],
        "finished_reasons": [None, {"type": "stop", "matched": 2}],
        "decoded_texts": ["x" * 1_000, ""],
        "output_ids": [packed(7), packed(8, 2)],
        "cached_tokens": [0, 16],
        **dict.fromkeys(OUTPUTS[6:13]),
        "cached_tokens_details": [None, {"device": 16, "host": 0}],
        "time_stats": ["PickleWrapper", msgspec.msgpack.encode([None, (1.0, 2.0, 3.0, 4, 5.0)])],
        "image_tokens": [0, 0],
    }
    return msgspec.msgpack.encode(["BatchTokenIDOutput", *(known | fields).values(), "a field of tomorrow"])


def test_a_request_is_the_template_with_its_fields(wire: Wire) -> None:
    first = wire.request("0f", array("q", [1, 2, 3]), {"temperature": 0.5}, bootstrap_room=1 << 62)
    kind, rid, _ipc, ids, sampling, stream, room = msgspec.msgpack.decode(first)
    assert (kind, rid, stream, room) == ("TokenizedGenerateReqInput", "0f", True, 1 << 62)
    assert sampling == [128, 0.5, None]
    assert wire.token_ids(ids) == [1, 2, 3]
    # What one request sets does not stay for the next.
    second = msgspec.msgpack.decode(wire.request("10", array("q", [4]), {}))
    assert (second[4], second[6]) == ([128, 1.0, None], None)


def test_aborts_and_flushes(wire: Wire) -> None:
    assert msgspec.msgpack.decode(wire.abort("0f")) == ["AbortReq", "0f", None, False, None]
    assert msgspec.msgpack.decode(wire.flush()) == ["FlushCacheReqInput", None, None, None]


def test_embeddings(wire: Wire) -> None:
    asked = msgspec.msgpack.decode(wire.embedding("0f", array("q", [1, 2])))
    assert (asked[0], asked[1], wire.token_ids(asked[2])) == ("TokenizedEmbeddingReqInput", "0f", [1, 2])
    times = ["PickleWrapper", msgspec.msgpack.encode([(1.0, 2.0, 0.0, 0, 0.5)])]
    answer = ["BatchEmbeddingOutput", ["0f"], [{"type": "stop"}], [[0.5, 1.0]], [2], [0], times]
    message = wire.decode(msgspec.msgpack.encode(answer))
    assert (message.rids, message.embeddings) == (["0f"], [[0.5, 1.0]])
    assert wire.times(message) == [(1.0, 2.0, 0.0, 0, 0.5)]


def test_outputs_give_what_is_needed(wire: Wire) -> None:
    message = wire.decode(outputs())
    assert message.rids == ["a", "b"]
    assert [wire.token_ids(ids) for ids in message.output_ids] == [[7], [8, 2]]
    assert message.finished_reasons[1] == {"type": "stop", "matched": 2}
    assert wire.cached_details(message, 1) == {"device": 16, "host": 0}
    assert list(wire.times(message)) == [None, (1.0, 2.0, 3.0, 4, 5.0)]


def test_log_probabilities_of_those_who_asked(wire: Wire) -> None:
    assert wire.logprobs(wire.decode(outputs())) is None
    message = wire.decode(
        outputs(
            input_token_logprobs_val=[[], [None, -1.0, -2.0]],
            input_top_logprobs_val=[[], [None, [-1.0], [-1.5]]],
            input_top_logprobs_idx=[[], [None, [5], [6]]],
            output_token_logprobs_val=[[], [-0.5, None]],
            output_top_logprobs_val=[[], [[-0.5, -1.5], None]],
            output_top_logprobs_idx=[[], [[8, 9], None]],
        )
    )
    logprobs = wire.logprobs(message)
    assert logprobs is not None
    assert (logprobs.output(0), logprobs.prompt(0)) == ([], [])
    assert logprobs.output(1) == [Logprob(-0.5, ((8, -0.5), (9, -1.5))), Logprob(float("-inf"), ())]
    assert logprobs.prompt(1) == [Logprob(-1.0, ((5, -1.0),)), Logprob(-2.0, ((6, -1.5),))]


def test_log_probabilities_without_alternatives(wire: Wire) -> None:
    message = wire.decode(
        outputs(
            output_token_logprobs_val=[[-0.5], [-1.0, -2.0]],
            output_top_logprobs_val=[[], [[], []]],
            output_top_logprobs_idx=[[], [[], []]],
        )
    )
    logprobs = wire.logprobs(message)
    assert logprobs is not None
    assert [logprobs.output(0), logprobs.output(1)] == [[Logprob(-0.5)], [Logprob(-1.0), Logprob(-2.0)]]
    assert logprobs.prompt(1) == []


def test_outputs_without_details_or_times(wire: Wire) -> None:
    message = wire.decode(outputs(cached_tokens_details=None, time_stats=None))
    assert wire.cached_details(message, 0) is None
    assert list(wire.times(message)) == [None, None]


def test_other_kinds_of_messages(wire: Wire) -> None:
    abort = wire.decode(msgspec.msgpack.encode(["AbortReq", "0f", None, False, {"type": "abort"}]))
    assert (abort.rid, abort.finished_reason) == ("0f", {"type": "abort"})
    flushed = wire.decode(msgspec.msgpack.encode(["FlushCacheReqOutput", None, None, False, "busy"]))
    assert (flushed.success, flushed.message) == (False, "busy")
    assert wire.decode(msgspec.msgpack.encode(["HealthCheckOutput", None])) is None


def test_a_message_we_know_in_a_shape_we_do_not_is_not_passed_over(wire: Wire) -> None:
    with pytest.raises(msgspec.ValidationError):
        wire.decode(outputs(rids="a"))


@pytest.mark.parametrize("field", ["output_ids", "time_stats"])
def test_a_release_without_a_needed_field_is_named(field: str) -> None:
    layout = copy.deepcopy(LAYOUT)
    layout["outputs"].remove(field)
    with pytest.raises(KvmeshError, match=f"BatchTokenIDOutput.{field}") as caught:
        Wire(layout)
    assert caught.value.code == ErrorCode.ERROR_CODE_ENGINE_FAILED
