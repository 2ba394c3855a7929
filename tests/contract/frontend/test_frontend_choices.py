"""Several choices, several prompts, echoes and log probabilities, before workers that tests script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer

from fixtures.frontend import ANSWER, EOS, MODEL, Serve, Split, chunks_of, endless, error_of, hello
from fixtures.scripted_worker import logprob_of
from fixtures.waiting import eventually
from kvmesh.frontend.serving.scores import chat_logprobs, completion_logprobs, score
from kvmesh.v1.engine_pb2 import EngineRequest, TokenLogprob
from kvmesh.v1.errors_pb2 import Error, ErrorCode


async def complete(split: Split, **fields: Any) -> dict[str, Any]:
    response = await split.front.http.post("/v1/completions", json={"model": MODEL, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def by_seed(tokenizer: Tokenizer, split: Split) -> None:
    """Let the workers answer every seed with another text."""

    def script(request: EngineRequest) -> Sequence[int]:
        text = f"answer {request.sampling.seed} to {request.token_ids[-1]}"
        return tokenizer.encode(text, add_special_tokens=False).ids

    split.prefill.script = split.decode.script = script


async def test_choices_have_seeds_in_a_row(split: Split, tokenizer: Tokenizer) -> None:
    by_seed(tokenizer, split)
    body = (await split.front.chat(n=4, seed=11)).json()
    alone = [(await split.front.chat(seed=11 + i)).json() for i in range(4)]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert texts == [one["choices"][0]["message"]["content"] for one in alone]
    assert len(set(texts)) == 4
    # The prompt counts once.
    assert body["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
    used = sum(one["usage"]["completion_tokens"] for one in alone)
    assert body["usage"]["completion_tokens"] == used
    names = {request.request_id for request in split.decode.received[:4]}
    assert len(names) == 4
    await split.idle()


async def test_choices_are_streamed_side_by_side(split: Split, tokenizer: Tokenizer) -> None:
    by_seed(tokenizer, split)
    split.decode.step_s = 0.002
    whole = (await split.front.chat(n=3, seed=5)).json()
    response = await split.front.chat(n=3, seed=5, stream=True, stream_options={"include_usage": True})
    chunks = chunks_of(response.text)
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    for index in range(3):
        mine = [choice for choice in choices if choice["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        text = "".join(choice["delta"].get("content") or "" for choice in mine)
        assert text == whole["choices"][index]["message"]["content"]
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["length"]
    order = [choice["index"] for choice in choices]
    assert order != sorted(order)
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len({chunk["system_fingerprint"] for chunk in chunks}) == 1
    await split.idle()


async def test_batches_are_answered_prompt_by_prompt(split: Split, tokenizer: Tokenizer) -> None:
    by_seed(tokenizer, split)
    body = await complete(split, prompt=[[5, 6], [7, 8, 9]], n=2, seed=1, max_tokens=30)
    texts = [choice["text"] for choice in body["choices"]]
    assert texts == [f"answer {seed} to {last}" for last in (6, 9) for seed in (1, 2)]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 5
    strings = await complete(split, prompt=["one", "two"], max_tokens=3)
    assert len(strings["choices"]) == 2
    await split.idle()


@pytest.mark.parametrize("echo", [False, True])
async def test_the_likeliest_of_more_choices_are_answered(
    split: Split, tokenizer: Tokenizer, echo: bool
) -> None:
    # A scripted token is the less likely the later it comes.
    said = [" one two three four", " one", " one two"]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in said]
    split.prefill.script = split.decode.script = lambda request: [*ids[request.sampling.seed], EOS]
    asked = {"prompt": ["a b c d", "x"], "n": 2, "best_of": 3, "seed": 0, "max_tokens": 30, "echo": echo}
    plain, scored = await complete(split, **asked), await complete(split, **asked, logprobs=0)
    wanted = [f"{prompt if echo else ''}{said[i]}" for prompt in asked["prompt"] for i in (1, 2)]
    for body in (plain, scored):
        assert [choice["text"] for choice in body["choices"]] == wanted
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        assert body["usage"]["completion_tokens"] == 2 * sum(len(one) + 1 for one in ids)
    assert all(choice["logprobs"] is None for choice in plain["choices"])
    assert all(choice["logprobs"]["tokens"] for choice in scored["choices"])
    await split.idle()


async def test_one_choice_that_fails_ends_all(split: Split) -> None:
    split.decode.failure = Error(code=ErrorCode.ERROR_CODE_INVALID_ARGUMENT, message="no", param="constraint")
    response = await split.front.chat(n=3, guided_regex="a")
    assert (response.status_code, error_of(response)["param"]) == (400, "guided_regex")
    await split.idle()
    split.fail_decoding(split.decode.failure, 3)
    response = await split.front.chat(n=3, stream=True)
    assert response.status_code == 200
    assert "invalid_value" in response.text.split("\n\n")[-2]
    await split.idle()


async def test_a_client_that_leaves_ends_all_choices(split: Split) -> None:
    split.decode.script = endless
    split.decode.step_s = 0.01
    async with split.front.http.stream(
        "POST", "/v1/chat/completions", json=hello(n=3, stream=True)
    ) as response:
        async for _ in response.aiter_lines():
            break
    await split.idle()
    await eventually(lambda: len(split.decode.cancelled) == 3, timeout=2)


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(split: Split, answer_ids: list[int], tokenizer: Tokenizer, stream: bool) -> None:
    response = await split.front.chat(logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        choices = [chunk["choices"][0] for chunk in chunks_of(response.text)]
        content = [one for choice in choices for one in (choice["logprobs"] or {}).get("content", [])]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    # Without the token that ended the answer.
    assert len(content) == len(answer_ids) - 1
    assert b"".join(bytes(one["bytes"]) for one in content) == ANSWER.encode()
    for place, one in enumerate(content):
        assert one["logprob"] == logprob_of(place, answer_ids[place], 2).logprob
        assert [top["logprob"] for top in one["top_logprobs"]] == [one["logprob"], one["logprob"] - 1]
        assert one["top_logprobs"][0]["bytes"] == one["bytes"]
    assert content[0]["token"] == tokenizer.decode(answer_ids[:1])
    sampling = split.prefill.received[0].sampling
    assert sampling.top_logprobs == 2
    await split.idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_end_where_the_text_does(split: Split, stream: bool) -> None:
    response = await split.front.chat(logprobs=True, stop=" France is", stream=stream)
    chunks = chunks_of(response.text) if stream else [response.json()]
    content = [
        one
        for chunk in chunks
        for choice in chunk["choices"]
        for one in (choice["logprobs"] or {}).get("content", [])
    ]
    assert b"".join(bytes(one["bytes"]) for one in content) == b"The capital of"
    await split.idle()


async def test_completion_logprobs_and_echo(
    split: Split, answer_ids: list[int], tokenizer: Tokenizer
) -> None:
    prompt = "Once upon a time"
    ids = tokenizer.encode(prompt).ids
    body = await complete(split, prompt=prompt, max_tokens=3, logprobs=2, echo=True)
    choice = body["choices"][0]
    assert choice["text"] == prompt + tokenizer.decode(answer_ids[:3])
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(ids) + 3
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    expected = [logprob_of(i, token, 1).logprob for i, token in enumerate(ids)][1:]
    assert logprobs["token_logprobs"][1 : len(ids)] == expected
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    plain = await complete(split, prompt=ids, max_tokens=3, logprobs=0)
    assert plain["choices"][0]["logprobs"]["text_offset"][0] == 0
    # The token that was chosen is always there, beside as many others as were asked for.
    chosen = plain["choices"][0]["logprobs"]
    assert [set(top) for top in chosen["top_logprobs"]] == [{token} for token in chosen["tokens"]]
    await split.idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_alone(split: Split, stream: bool) -> None:
    response = await split.front.http.post(
        "/v1/completions",
        json={"model": MODEL, "prompt": "Once", "max_tokens": 0, "echo": True, "stream": stream},
    )
    chunks = chunks_of(response.text) if stream else [response.json()]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == "Once"
    assert choices[-1]["finish_reason"] == "length"
    if not stream:
        assert chunks[0]["usage"]["completion_tokens"] == 0
    await split.idle()


async def test_an_unlikely_token_is_beside_the_likely_ones(split: Split, answer_ids: list[int]) -> None:
    text = split.front.models.resolve(MODEL).tokenizer.text
    unlikely = TokenLogprob(logprob=-9, top_ids=[answer_ids[1]], top_logprobs=[-1])
    (top,) = completion_logprobs([score(text, answer_ids[0], unlikely, 0)])["top_logprobs"]
    assert top == {text.decode(answer_ids[:1]): -9, text.decode(answer_ids[1:2]): -1}


async def test_an_impossible_token_is_still_json(split: Split, answer_ids: list[int]) -> None:
    text = split.front.models.resolve(MODEL).tokenizer.text
    never = TokenLogprob(logprob=float("-inf"), top_ids=[5], top_logprobs=[float("-inf")])
    written = chat_logprobs([score(text, answer_ids[0], never, 0)])["content"][0]
    assert written["logprob"] == written["top_logprobs"][0]["logprob"] == -9999.0


async def test_an_answer_between_two_texts(serve: Serve, split: Split) -> None:
    body = {"model": MODEL, "prompt": ["def f(", ""], "suffix": "return x", "max_tokens": 4}
    refused = await split.front.http.post("/v1/completions", json=body)
    assert error_of(refused) == {**error_of(refused), "param": "suffix", "code": "unsupported_parameter"}
    async with serve(ANSWER, marks=True) as marked:
        await complete(marked, **body)
        spelled = Tokenizer.from_file(f"{marked.decode.info().model.path}/tokenizer.json")
        asked = {spelled.decode(one.token_ids, skip_special_tokens=False) for one in marked.decode.received}
        assert asked == {
            "<fim_prefix>def f(<fim_suffix>return x<fim_middle>",
            "<fim_prefix><fim_suffix>return x<fim_middle>",
        }
        assert all(spelled.token_to_id("<fim_middle>") == one.token_ids[-1] for one in marked.decode.received)
