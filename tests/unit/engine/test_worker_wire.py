"""Between engine.proto and the Engine contract."""

from __future__ import annotations

from kvmesh.engine.contract import Constraint, ConstraintKind, Logprob, Sampling, StepOutput
from kvmesh.engine.worker.wire import read_sampling, write_step
from kvmesh.v1 import engine_pb2


def test_absent_fields_are_the_contracts_defaults() -> None:
    assert read_sampling(engine_pb2.SamplingParams()) == Sampling()


def test_every_field_is_read() -> None:
    message = engine_pb2.SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        frequency_penalty=1,
        presence_penalty=-1,
        repetition_penalty=1.5,
        max_new_tokens=7,
        min_new_tokens=2,
        stop_token_ids=[4, 5],
        ignore_eos=True,
        seed=11,
        logit_bias={6: -1.5},
        constraint=engine_pb2.Constraint(ebnf="root ::= x"),
        top_logprobs=0,
        prompt_logprobs=True,
    )
    assert {field.name for field, _ in message.ListFields()} == set(message.DESCRIPTOR.fields_by_name)
    assert read_sampling(message) == Sampling(
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        min_p=0.125,
        frequency_penalty=1,
        presence_penalty=-1,
        repetition_penalty=1.5,
        max_new_tokens=7,
        min_new_tokens=2,
        stop_token_ids=(4, 5),
        ignore_eos=True,
        seed=11,
        logit_bias={6: -1.5},
        constraint=Constraint(ConstraintKind.EBNF, "root ::= x"),
        top_logprobs=0,
        prompt_logprobs=True,
    )


def test_every_kind_of_constraint_has_a_name_in_both() -> None:
    kinds = engine_pb2.Constraint.DESCRIPTOR.oneofs_by_name["kind"].fields
    assert {field.name for field in kinds} == {kind.value for kind in ConstraintKind}


def test_steps_of_one_request_are_merged() -> None:
    step = engine_pb2.RequestStep()
    write_step(step, StepOutput(1, [5], logprobs=[Logprob(-0.5, ((5, -0.5), (6, -2)))]))
    write_step(step, StepOutput(1, [7], logprobs=[Logprob(-1)], prompt_logprobs=[Logprob(-3)]))
    assert list(step.token_ids) == [5, 7]
    assert [one.logprob for one in step.logprobs] == [-0.5, -1]
    assert (list(step.logprobs[0].top_ids), list(step.logprobs[0].top_logprobs)) == ([5, 6], [-0.5, -2])
    assert [one.logprob for one in step.prompt_logprobs] == [-3]
