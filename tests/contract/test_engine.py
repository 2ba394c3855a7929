"""What every engine must do: the mock in the default run, SGLang where it is marked."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

import pytest
import pytest_asyncio

from fixtures.engines import (
    CONFIGS,
    SPLIT,
    Engines,
    Running,
    at,
    check_outputs,
    fresh_prompt,
    greedy,
    refused,
    request,
    tokens_of,
)
from fixtures.waiting import eventually
from kvmesh.common.block_names import chain_seed
from kvmesh.common.config import load_config
from kvmesh.common.errors import KvmeshError
from kvmesh.core import hash_tokens
from kvmesh.engine.contract import (
    Bootstrap,
    Constraint,
    ConstraintKind,
    FinishReason,
    Logprob,
    Role,
    Sampling,
    StepOutput,
)
from kvmesh.engine.mock.engine import MockEngine
from kvmesh.v1.errors_pb2 import ErrorCode

# One event loop for all, so that engines can be started once.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


@pytest_asyncio.fixture(
    loop_scope="module",
    scope="module",
    params=["mock", pytest.param("sglang", marks=pytest.mark.sglang)],
)
async def engines(request: pytest.FixtureRequest) -> AsyncIterator[Engines]:
    engines = Engines(load_config(overrides=CONFIGS[request.param]))
    try:
        yield engines
    finally:
        await engines.close()


@pytest_asyncio.fixture(loop_scope="module")
async def aggregated(engines: Engines) -> Running:
    return await engines.get(Role.AGGREGATED)


async def test_info_describes_a_pool_that_can_hold_the_context(aggregated: Running) -> None:
    info = aggregated.info
    assert info.role is Role.AGGREGATED
    assert info.page_size > 0
    assert info.block_bytes > 0
    assert info.context_length <= info.total_blocks * info.page_size
    assert info.eos_token_ids
    assert all(0 <= token < info.vocab_size for token in info.eos_token_ids)
    assert info.bootstrap_port == 0


@pytest.mark.parametrize("length", [1, 15, 16, 17, 300])
async def test_a_request_gives_its_tokens_and_one_finish(aggregated: Running, length: int) -> None:
    outputs = await aggregated.run(request(fresh_prompt(length), greedy(12)))
    assert check_outputs(outputs) is FinishReason.LENGTH
    assert len(tokens_of(outputs)) == 12
    assert all(0 <= token < aggregated.info.vocab_size for token in tokens_of(outputs))
    assert outputs[-1].timing is not None
    assert outputs[-1].timing.prefill_ms > 0


async def test_greedy_output_depends_on_the_prompt_alone(aggregated: Running) -> None:
    prompts = [fresh_prompt(length) for length in (5, 20, 40, 80) * 2]
    alone = [tokens_of(await aggregated.run(request(prompt))) for prompt in prompts]
    together = await asyncio.gather(*(aggregated.run(request(prompt)) for prompt in prompts))
    assert [tokens_of(outputs) for outputs in together] == alone
    # Not all: a shallow model has little to say, and says some of it often.
    assert len({tuple(tokens) for tokens in alone}) > 1


async def test_one_step_brings_all_requests_of_a_sink_at_once(aggregated: Running) -> None:
    batches: list[list[StepOutput]] = []
    handles = {
        aggregated.engine.submit(request(fresh_prompt(20), greedy(30)), batches.append) for _ in range(6)
    }
    await eventually(lambda: sum(output.finish is not None for batch in batches for output in batch) == 6, 60)
    assert {output.handle for batch in batches for output in batch} == handles
    assert all(len({output.handle for output in batch}) == len(batch) for batch in batches)
    # 180 tokens; all but the first few come in steps of six.
    assert len(batches) <= 60


async def test_a_stop_token_ends_and_is_included(aggregated: Running) -> None:
    prompt = fresh_prompt(20)
    free = tokens_of(await aggregated.run(request(prompt, greedy(16))))
    stop = free[7]
    until = free[: free.index(stop) + 1]
    outputs = await aggregated.run(request(prompt, greedy(16, ignore_eos=False, stop_token_ids=(stop,))))
    assert check_outputs(outputs) is FinishReason.STOP
    assert tokens_of(outputs) == until
    assert outputs[-1].finish is not None
    assert outputs[-1].finish.matched_token_id == stop


async def test_no_stop_before_the_least_number_of_tokens(aggregated: Running) -> None:
    prompt = fresh_prompt(20)
    stop = tokens_of(await aggregated.run(request(prompt, greedy(1))))[0]
    sampling = greedy(12, ignore_eos=False, stop_token_ids=(stop,), min_new_tokens=6)
    outputs = await aggregated.run(request(prompt, sampling))
    check_outputs(outputs)
    assert len(tokens_of(outputs)) >= 6


async def test_sampling_gives_another_text_than_greedy(aggregated: Running) -> None:
    prompt = fresh_prompt(20)
    sampling = Sampling(temperature=5.0, top_p=0.9, top_k=1_000, max_new_tokens=24, ignore_eos=True, seed=7)
    outputs = await aggregated.run(request(prompt, sampling))
    assert check_outputs(outputs) is FinishReason.LENGTH
    assert len(tokens_of(outputs)) == 24
    assert tokens_of(outputs) != tokens_of(await aggregated.run(request(prompt, greedy(24))))


async def test_a_repeat_finds_its_prompt_cached(aggregated: Running) -> None:
    prompt = fresh_prompt(100)
    first = await aggregated.run(request(prompt))
    again = await aggregated.run(request(prompt))
    assert first[0].cached is not None
    assert first[0].cached.device == 0
    assert again[0].cached is not None
    assert again[0].cached.device == 96
    assert tokens_of(first) == tokens_of(again)


async def test_a_salt_keeps_caches_apart(aggregated: Running) -> None:
    prompt = fresh_prompt(100)
    await aggregated.run(request(prompt, cache_salt="one"))
    other = await aggregated.run(request(prompt, cache_salt="two"))
    same = await aggregated.run(request(prompt, cache_salt="one"))
    assert other[0].cached is not None
    assert other[0].cached.device == 0
    assert same[0].cached is not None
    assert same[0].cached.device == 96


@pytest.mark.parametrize("role", list(Role))
async def test_a_rehearsed_prompt_is_cached_in_every_role(engines: Engines, role: Role) -> None:
    running = await engines.get(role)
    prompt = fresh_prompt(5 * running.info.page_size)
    for salt in ("", "tenant:acme"):
        await running.engine.cache_prompt(prompt, salt)
        pages = set(hash_tokens(prompt, running.info.page_size, chain_seed(salt)).tolist())
        await eventually(lambda pages=pages: pages <= running.blocks, 10, "the prompt's blocks")
    await eventually(running.idle, 5, "no request")
    # A decode engine's blocks of it hold nothing to be used.
    await running.engine.flush_cache()
    await eventually(lambda: not running.blocks, 5, "an empty cache")


@pytest.mark.parametrize("role", list(Role))
async def test_an_engine_measures_itself_and_leaves_no_trace(engines: Engines, role: Role) -> None:
    running = await engines.get(role)
    await eventually(running.idle, 5)
    blocks, before = set(running.blocks), running.engine.load()
    probe = await running.engine.probe()
    await eventually(running.idle, 5)
    after = running.engine.load()
    assert running.blocks == blocks
    assert after.blocks_cached == before.blocks_cached
    assert (after.prompt_tokens_total, after.output_tokens_total) == (
        before.prompt_tokens_total,
        before.output_tokens_total,
    )
    assert bool(probe.prefill) == (role is not Role.DECODE)
    assert bool(probe.decode) == (role is not Role.PREFILL)
    assert all(tokens > 0 and ms > 0 for tokens, ms in (*probe.prefill, *probe.transfer))
    assert all(streams > 0 and 0 <= share < 1 and ms > 0 for streams, share, ms in probe.decode)


async def test_events_name_the_cached_blocks(aggregated: Running) -> None:
    prompt = fresh_prompt(100)
    output = tokens_of(await aggregated.run(request(prompt, greedy(40))))
    # The last token's KV is never computed.
    pages = set(hash_tokens([*prompt, *output[:-1]], aggregated.info.page_size).tolist())
    await eventually(lambda: pages <= aggregated.blocks, 5, "the blocks of prompt and output")
    await eventually(aggregated.idle, 5, "no request")
    await eventually(lambda: aggregated.engine.load().blocks_cached == len(aggregated.blocks), 5)


async def test_eviction_is_told(aggregated: Running) -> None:
    capacity = aggregated.info.total_blocks
    length = capacity * aggregated.info.page_size // 4
    prompts = [fresh_prompt(length) for _ in range(6)]
    for prompt in prompts:
        await aggregated.run(request(prompt, greedy(2)))
    await eventually(lambda: aggregated.engine.load().blocks_cached == len(aggregated.blocks), 5)
    assert len(aggregated.blocks) <= capacity
    last = set(hash_tokens(prompts[-1], aggregated.info.page_size).tolist())
    first = set(hash_tokens(prompts[0], aggregated.info.page_size).tolist())
    assert last <= aggregated.blocks
    assert not first & aggregated.blocks


async def test_flush_forgets_everything(aggregated: Running) -> None:
    prompt = fresh_prompt(64)
    await aggregated.run(request(prompt))
    await eventually(lambda: aggregated.blocks, 5)
    await eventually(aggregated.idle, 5)
    await aggregated.engine.flush_cache()
    await eventually(lambda: not aggregated.blocks, 5, "the events of the flush")
    assert aggregated.engine.load().blocks_cached == 0
    again = await aggregated.run(request(prompt))
    assert again[0].cached is not None
    assert again[0].cached.device == 0


async def test_flush_waits_for_nobody(aggregated: Running) -> None:
    generator = aggregated.engine.generate(request(fresh_prompt(20), greedy(1_000)))
    async with aclosing(generator):
        await anext(generator)
        with pytest.raises(KvmeshError) as caught:
            await aggregated.engine.flush_cache()
        assert caught.value.code == ErrorCode.ERROR_CODE_OVERLOADED
    await eventually(aggregated.idle, 5)


async def test_unusable_requests_are_refused_before_they_are_queued(aggregated: Running) -> None:
    info, engine = aggregated.info, aggregated.engine
    for prompt in ([], [info.vocab_size], [5, -1, 5]):
        error = await refused(engine, request(prompt))
        assert error.code == ErrorCode.ERROR_CODE_INVALID_ARGUMENT
    error = await refused(engine, request(fresh_prompt(info.context_length + 1)))
    assert error.code == ErrorCode.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED
    error = await refused(engine, request([5], bootstrap=Bootstrap("127.0.0.1", 1, 1)))
    assert error.code == ErrorCode.ERROR_CODE_WRONG_ROLE
    assert check_outputs(await aggregated.run(request([5]))) is FinishReason.LENGTH


@pytest.mark.parametrize("role", SPLIT)
async def test_halves_of_a_split_request_need_a_meeting_point(engines: Engines, role: Role) -> None:
    error = await refused((await engines.get(role)).engine, request([5]))
    assert error.code == ErrorCode.ERROR_CODE_WRONG_ROLE


async def test_output_ends_where_the_context_does(aggregated: Running) -> None:
    limit = aggregated.info.context_length
    outputs = await aggregated.run(request(fresh_prompt(limit - 10), greedy(None)))
    assert check_outputs(outputs) is FinishReason.LENGTH
    assert 1 <= len(tokens_of(outputs)) <= 10


@pytest.mark.parametrize("steps", [0, 1, 5])
async def test_abort_ends_with_cancelled_and_frees_blocks(aggregated: Running, steps: int) -> None:
    outputs: list[StepOutput] = []
    handle = aggregated.engine.submit(request(fresh_prompt(100), greedy(1_000)), outputs.extend)
    await eventually(lambda: len(outputs) >= steps, 30)
    aggregated.engine.abort(handle)
    aggregated.engine.abort(handle)
    await eventually(lambda: outputs and outputs[-1].finish is not None, 10)
    assert check_outputs(outputs) is FinishReason.CANCELLED
    assert len(outputs) < 500
    await eventually(aggregated.idle, 2, "blocks to be free")
    aggregated.engine.abort(handle)


async def test_closing_the_generator_aborts(aggregated: Running) -> None:
    generator = aggregated.engine.generate(request(fresh_prompt(100), greedy(1_000)))
    async with aclosing(generator):
        await anext(generator)
        assert aggregated.engine.load().requests == 1
    await eventually(aggregated.idle, 2)


async def test_aborting_one_leaves_the_others(aggregated: Running) -> None:
    prompts = [fresh_prompt(30) for _ in range(12)]
    expected = [tokens_of(await aggregated.run(request(prompt, greedy(24)))) for prompt in prompts]
    results: list[list[StepOutput]] = [[] for _ in prompts]
    handles = [
        aggregated.engine.submit(request(prompt, greedy(24)), result.extend)
        for prompt, result in zip(prompts, results, strict=True)
    ]
    aggregated.engine.abort(handles[1])
    await eventually(lambda: all(result and result[-1].finish for result in results), 60)
    assert check_outputs(results[1]) is FinishReason.CANCELLED
    for number, result in enumerate(results):
        if number != 1:
            assert check_outputs(result) is FinishReason.LENGTH
            assert tokens_of(result) == expected[number]


@pytest.mark.parametrize("length", [5, 16, 100, 1_000])
async def test_split_equals_aggregated(engines: Engines, aggregated: Running, length: int) -> None:
    prompt = fresh_prompt(length)
    whole = await aggregated.run(request(prompt, greedy(20)))
    prefill, decode = await engines.split(prompt, greedy(20))
    assert check_outputs(decode) is FinishReason.LENGTH
    assert tokens_of(decode) == tokens_of(whole)
    check_outputs(prefill)
    assert tokens_of(prefill) == tokens_of(whole)[:1]
    info = (await engines.get(Role.PREFILL)).info
    assert prefill[-1].timing is not None
    assert prefill[-1].timing.transfer_bytes == -(-length // info.page_size) * info.block_bytes
    for role in SPLIT:
        await eventually((await engines.get(role)).idle, 5)


async def test_split_requests_in_parallel(engines: Engines, aggregated: Running) -> None:
    prompts = [fresh_prompt(20 + 10 * number) for number in range(6)]
    whole = [tokens_of(await aggregated.run(request(prompt))) for prompt in prompts]
    halves = await asyncio.gather(*(engines.split(prompt, greedy(8)) for prompt in prompts))
    assert [tokens_of(decode) for _, decode in halves] == whole


async def test_a_split_repeat_is_cached_at_prefill(engines: Engines) -> None:
    prompt = fresh_prompt(100)
    first, _ = await engines.split(prompt, greedy(4))
    again, _ = await engines.split(prompt, greedy(4))
    assert first[0].cached is not None
    assert first[0].cached.device == 0
    assert again[0].cached is not None
    assert again[0].cached.device == 96


def logprobs_of(outputs: list[StepOutput]) -> list[Logprob]:
    return [logprob for output in outputs for logprob in output.logprobs]


def check_logprobs(logprobs: Sequence[Logprob], tokens: Sequence[int], top: int) -> None:
    """Of greedy tokens: each is the likeliest in its place."""
    assert len(logprobs) == len(tokens)
    for logprob, token in zip(logprobs, tokens, strict=True):
        assert logprob.logprob <= 0
        assert len(logprob.top) == top
        values = [value for _, value in logprob.top]
        assert values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) <= 1.001
        if top:
            assert (token, logprob.logprob) in [(one, pytest.approx(value)) for one, value in logprob.top]


@pytest.mark.parametrize("top", [0, 1, 5])
async def test_log_probabilities(aggregated: Running, top: int) -> None:
    prompt = fresh_prompt(20)
    plain = await aggregated.run(request(prompt, greedy(6)))
    outputs = await aggregated.run(request(prompt, greedy(6, top_logprobs=top)))
    assert tokens_of(outputs) == tokens_of(plain)
    check_logprobs(logprobs_of(outputs), tokens_of(outputs), top)
    assert all(len(output.logprobs) == len(output.token_ids) for output in outputs)
    assert not logprobs_of(plain)
    assert not any(output.prompt_logprobs for output in outputs)


async def test_log_probabilities_of_some_in_a_batch(aggregated: Running) -> None:
    prompts = [fresh_prompt(20) for _ in range(4)]
    tops = [None, 3, None, 0]
    wanted = [request(p, greedy(8, top_logprobs=top)) for p, top in zip(prompts, tops, strict=True)]
    for outputs, top in zip(await asyncio.gather(*map(aggregated.run, wanted)), tops, strict=True):
        if top is None:
            assert not logprobs_of(outputs)
        else:
            check_logprobs(logprobs_of(outputs), tokens_of(outputs), top)


async def test_log_probabilities_of_the_prompt(aggregated: Running) -> None:
    prompt = fresh_prompt(40)
    asked = greedy(3, top_logprobs=2, prompt_logprobs=True)
    for _ in range(2):  # the second finds the prompt cached
        outputs = await aggregated.run(request(prompt, asked))
        scores = outputs[0].prompt_logprobs
        assert len(scores) == len(prompt) - 1
        assert all(score.logprob <= 0 and len(score.top) == 2 for score in scores)
        assert not any(output.prompt_logprobs for output in outputs[1:])
        check_logprobs(logprobs_of(outputs), tokens_of(outputs), 2)


async def test_split_log_probabilities_equal_aggregated(engines: Engines, aggregated: Running) -> None:
    prompt = fresh_prompt(50)
    asked = greedy(6, top_logprobs=3, prompt_logprobs=True)
    whole = await aggregated.run(request(prompt, asked))
    prefill, decode = await engines.split(prompt, asked)
    assert tokens_of(decode) == tokens_of(whole)
    for one, other in zip(logprobs_of(decode), logprobs_of(whole), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-3)
    assert not any(output.prompt_logprobs for output in decode)
    scores = [score.logprob for score in prefill[0].prompt_logprobs]
    assert scores == pytest.approx([score.logprob for score in whole[0].prompt_logprobs], abs=1e-3)


async def test_biases(aggregated: Running) -> None:
    prompt = fresh_prompt(20)
    plain = tokens_of(await aggregated.run(request(prompt, greedy(4))))
    forced = await aggregated.run(request(prompt, greedy(4, logit_bias={1_234: 100.0})))
    assert tokens_of(forced) == [1_234] * 4
    banned = await aggregated.run(request(prompt, greedy(4, logit_bias=dict.fromkeys(plain, -100.0))))
    assert not set(tokens_of(banned)) & set(plain)


async def test_bad_wishes_are_refused_before_they_are_queued(aggregated: Running) -> None:
    cases = [
        ({"logit_bias": {aggregated.info.vocab_size: 1.0}}, "logit_bias"),
        ({"logit_bias": {5: 101.0}}, "logit_bias"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
    ]
    for fields, param in cases:
        error = await refused(aggregated.engine, request([5], greedy(4, **fields)))
        assert (error.code, error.param) == (ErrorCode.ERROR_CODE_INVALID_ARGUMENT, param)


async def test_a_constraint_is_kept_or_refused(aggregated: Running) -> None:
    constraint = Constraint(ConstraintKind.REGEX, "[0-9]{3}x")
    wanted = request(fresh_prompt(20), Sampling(temperature=0, max_new_tokens=30, constraint=constraint))
    if aggregated.engine.__class__ is MockEngine:
        error = await refused(aggregated.engine, wanted)
        assert (error.code, error.param) == (ErrorCode.ERROR_CODE_UNSUPPORTED, "constraint")
        return
    outputs = await aggregated.run(wanted)
    assert check_outputs(outputs) is FinishReason.STOP
    assert 1 <= len(tokens_of(outputs)) <= 5


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.05])
async def test_aborting_both_halves_frees_both(engines: Engines, delay: float) -> None:
    prefill, decode = await engines.get(Role.PREFILL), await engines.get(Role.DECODE)
    meeting, prompt = at(prefill), fresh_prompt(500)
    results: dict[Running, list[StepOutput]] = {prefill: [], decode: []}
    handles = {
        running: running.engine.submit(request(prompt, greedy(1_000), meeting), outputs.extend)
        for running, outputs in results.items()
    }
    await asyncio.sleep(delay)
    for running, handle in handles.items():
        running.engine.abort(handle)
    for running, outputs in results.items():
        await eventually(lambda outputs=outputs: outputs and outputs[-1].finish is not None, 10)
        check_outputs(outputs)
        await eventually(running.idle, 10, f"{running.info.role} to be idle")


async def test_close_ends_live_requests_with_an_error() -> None:
    running = await Running.start(load_config(overrides=CONFIGS["mock"]), Role.AGGREGATED)
    results: list[list[StepOutput]] = [[], []]
    for result in results:
        running.engine.submit(request(fresh_prompt(100), greedy(1_000)), result.extend)
    await eventually(lambda: all(results))
    await running.close()
    await running.close()
    await eventually(lambda: all(result[-1].finish for result in results))
    for result in results:
        assert check_outputs(result) is FinishReason.ERROR
        assert result[-1].finish is not None
        assert result[-1].finish.error is not None
    with pytest.raises(KvmeshError):
        running.engine.submit(request([5]), lambda outputs: None)


async def test_an_engine_alive_has_not_failed(aggregated: Running) -> None:
    waiting = asyncio.create_task(aggregated.engine.failed())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    waiting.cancel()
    assert check_outputs(await aggregated.run(request([5]))) is FinishReason.LENGTH
