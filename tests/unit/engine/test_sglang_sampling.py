"""A request's sampling in SGLang's terms."""

from __future__ import annotations

from typing import Any

import pytest

from kvmesh.common.errors import KvmeshError
from kvmesh.engine.contract import Constraint, ConstraintKind, Role, Sampling
from kvmesh.engine.sglang.sampling import logprob_fields, sampling_fields
from kvmesh.v1.errors_pb2 import ErrorCode

VOCAB = 1_000


def fields(role: Role = Role.AGGREGATED, room: int = 100, **sampling: Any) -> dict[str, Any]:
    return sampling_fields(Sampling(**sampling), role, VOCAB, room)


def test_zero_temperature_is_the_one_likeliest_token() -> None:
    greedy = fields(temperature=0.0, top_k=50)
    assert (greedy["temperature"], greedy["top_k"]) == (1.0, 1)


def test_no_top_k_is_the_whole_vocabulary() -> None:
    assert fields()["top_k"] >= VOCAB
    assert fields(top_k=7)["top_k"] == 7


def test_no_limit_is_what_fits_and_a_limit_never_more() -> None:
    assert fields(room=33)["max_new_tokens"] == 33
    assert fields(room=33, max_new_tokens=50)["max_new_tokens"] == 33
    assert fields(room=33, max_new_tokens=5)["max_new_tokens"] == 5


def test_prefill_reserves_room_for_its_one_token_only() -> None:
    assert fields(Role.PREFILL, max_new_tokens=500)["max_new_tokens"] == 1


def test_seeds_and_stop_tokens_are_sent_only_when_given() -> None:
    assert not {"sampling_seed", "stop_token_ids"} & fields().keys()
    given = fields(seed=(1 << 64) - 1, stop_token_ids=(5, 3, 5))
    assert 0 <= given["sampling_seed"] < 1 << 63
    assert given["stop_token_ids"] == [3, 5]


def test_biases_and_constraints_are_sent_only_when_given() -> None:
    assert not {"logit_bias", "json_schema", "regex"} & fields().keys()
    given = fields(logit_bias={7: -100.0}, constraint=Constraint(ConstraintKind.REGEX, "a"))
    assert (given["logit_bias"], given["regex"]) == ({"7": -100.0}, "a")


@pytest.mark.parametrize(("role", "start"), [(Role.AGGREGATED, 0), (Role.PREFILL, 0), (Role.DECODE, -1)])
def test_both_halves_ask_for_log_probabilities_and_one_for_the_prompts(role: Role, start: int) -> None:
    assert logprob_fields(Sampling(), role) == {}
    output = logprob_fields(Sampling(top_logprobs=0), role)
    assert output == {"return_logprob": True, "top_logprobs_num": 0, "logprob_start_len": -1}
    assert logprob_fields(Sampling(top_logprobs=2, prompt_logprobs=True), role)["logprob_start_len"] == start


def test_a_least_length_cannot_be_kept_under_a_constraint() -> None:
    with pytest.raises(KvmeshError) as caught:
        fields(min_new_tokens=2, constraint=Constraint(ConstraintKind.REGEX, "a"))
    assert caught.value.param == "min_new_tokens"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("logit_bias", {VOCAB: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {5: 100.5}),
        ("logit_bias", {5: float("nan")}),
        ("top_logprobs", 21),
        ("prompt_logprobs", True),
        ("top_k", 0),
        ("top_k", -2),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("min_new_tokens", -1),
        ("stop_token_ids", (VOCAB,)),
        ("stop_token_ids", (-1,)),
    ],
)
def test_what_the_scheduler_would_die_of_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(KvmeshError) as caught:
        fields(**{name: value})
    assert caught.value.code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    assert caught.value.param == name


def test_the_least_length_must_not_exceed_the_most() -> None:
    with pytest.raises(KvmeshError) as caught:
        fields(min_new_tokens=6, max_new_tokens=5)
    assert caught.value.param == "min_new_tokens"
