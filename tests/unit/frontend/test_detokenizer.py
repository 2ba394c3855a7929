"""Incremental text equals the text of a full decode, however the ids are cut."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models

from fixtures.frontend import model_path
from kvmesh.frontend.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(f"{model_path()}/tokenizer.json")


def cut_and_feed(tokenizer: Tokenizer, ids: list[int], rng: random.Random) -> tuple[str, list[str]]:
    detokenizer = Detokenizer(tokenizer)
    pieces, at = [], 0
    while at < len(ids):
        count = rng.choice((1, 1, 1, 2, 5))
        pieces.append(detokenizer.feed(ids[at : at + count]))
        at += count
    pieces.append(detokenizer.flush())
    return "".join(pieces), pieces


def test_random_ids(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(1000):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randrange(1, 120))]
        text, _ = cut_and_feed(tokenizer, ids, rng)
        assert text == tokenizer.decode(ids, skip_special_tokens=True), ids


def test_random_unicode(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    ranges = [(0x20, 0x7F), (0xA0, 0x17F), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (0x300, 0x36F)]
    for _ in range(1000):
        source = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(60))
        ids = tokenizer.encode(source, add_special_tokens=False).ids
        text, pieces = cut_and_feed(tokenizer, ids, rng)
        assert text == source
        # No piece shows half a character that a later one completes.
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_character_is_held_until_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🧿", add_special_tokens=False).ids
    assert len(ids) > 1
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.feed([token]) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert detokenizer.feed(ids[-1:]) == "🧿"
    assert detokenizer.flush() == ""


def test_unfinished_character_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🧿", add_special_tokens=False).ids[:-1]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.feed(ids) + detokenizer.flush() == tokenizer.decode(ids)


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.feed([1, 2, 2]) == ""


def sentencepiece_like() -> Tokenizer:
    """Words that begin with the space mark, and bytes for everything else."""
    vocabulary = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    vocabulary += [("▁hello", 0.0), ("▁world", 0.0), ("s", 0.0), ("<unk>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=259, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def test_leading_spaces_and_byte_fallback() -> None:
    tokenizer = sentencepiece_like()
    hello, world, plural = 256, 257, 258
    ids = ([hello, world, plural, *"你🧿".encode(), hello, *"é".encode()]) * 20
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.feed([token]) for token in ids) + detokenizer.flush()
    assert text == tokenizer.decode(ids)
    assert text.startswith("hello worlds你🧿 helloé hello")


def test_window_stays_small(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("a long answer about nothing at all " * 100, add_special_tokens=False).ids
    longest = 0
    for token in ids:
        detokenizer.feed([token])
        longest = max(longest, len(detokenizer._window))
    assert longest < 40
