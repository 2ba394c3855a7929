"""What the mock engine says."""

from __future__ import annotations

import json
from pathlib import Path

from kvmesh.engine.contract import Finish, FinishReason, Sampling
from kvmesh.engine.mock.tokens import TokenSource, Vocabulary, finish_after

WORDS = Vocabulary(range(100, 4_000), (2,))
GREEDY = Sampling(temperature=0.0)


def text(prompt: list[int], sampling: Sampling, length: int) -> list[int]:
    source = TokenSource(WORDS, prompt, sampling)
    return [source.next() for _ in range(length)]


def test_a_text_goes_on_alike_wherever_it_is_taken_up() -> None:
    prompt = [5, 6, 7]
    whole = text(prompt, GREEDY, 50)
    assert text([*prompt, *whole[:20]], GREEDY, 30) == whole[20:]
    source = TokenSource(WORDS, prompt, GREEDY)
    source.append(whole[0])
    assert [source.next() for _ in range(49)] == whole[1:]


def test_prompt_and_sampling_decide() -> None:
    base = text([1, 2, 3], GREEDY, 20)
    assert text([1, 2, 4], GREEDY, 20) != base
    assert text([1, 2, 3], Sampling(temperature=0.0, seed=9), 20) == base
    sampled = [text([1, 2, 3], Sampling(temperature=0.7, seed=seed), 20) for seed in (1, 2)]
    assert len({tuple(each) for each in (base, *sampled)}) == 3


def test_texts_end_by_themselves_unless_told_not_to() -> None:
    ended = sum(2 in text([seed], GREEDY, 3_000) for seed in range(20))
    assert ended > 10
    assert not any(2 in text([seed], Sampling(temperature=0.0, ignore_eos=True), 3_000) for seed in range(5))
    source = TokenSource(WORDS, [1], GREEDY)
    assert 2 not in [source.next(may_end=False) for _ in range(5_000)]


def test_how_a_request_ends() -> None:
    def finish(sampling: Sampling, token: int, generated: int, limit: int = 10) -> Finish | None:
        return finish_after(sampling, (2,), token, generated, limit)

    assert finish(GREEDY, 7, 9) is None
    assert finish(GREEDY, 7, 10) == Finish(FinishReason.LENGTH)
    assert finish(GREEDY, 2, 3) == Finish(FinishReason.STOP, matched_token_id=2)
    assert finish(Sampling(ignore_eos=True), 2, 3) is None
    assert finish(Sampling(stop_token_ids=(7,)), 7, 10) == Finish(FinishReason.STOP, matched_token_id=7)
    assert finish(Sampling(stop_token_ids=(7,), min_new_tokens=5), 7, 4) is None


def test_vocabulary_of_a_checkpoint(tmp_path: Path) -> None:
    vocab = {"Ġhello": 5, "hello": 6, "Ġa": 7, "Ġworld": 8, "ĠNo": 9, "Ġfar": 400}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4, 900]}))
    vocabulary = Vocabulary.load(str(tmp_path), 100)
    assert vocabulary.words == (5, 8)
    assert vocabulary.eos == (3, 4)

    unigram = {"model": {"vocab": [["<unk>", 0.0], ["▁the", -1.0], ["x", -2.0], ["▁cat", -3.0]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    assert Vocabulary.load(str(tmp_path), 100).words == (1,)


def test_vocabulary_of_nothing(tmp_path: Path) -> None:
    vocabulary = Vocabulary.load(str(tmp_path), 1_000)
    assert vocabulary.eos == (2,)
    assert vocabulary.words == tuple(range(256, 1_000))
