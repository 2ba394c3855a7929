"""Token ids to text: incrementally, however cut, the text of a full decode."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fixtures.frontend import model_path
from kvmesh.core import TextModel, TextStream


def cut_and_feed(model: TextModel, ids: list[int], rng: random.Random) -> tuple[str, list[str]]:
    stream = TextStream(model)
    pieces, at = [], 0
    while at < len(ids):
        count = rng.choice((1, 1, 1, 2, 5))
        pieces.append(stream.feed(ids[at : at + count]).content)
        at += count
    pieces.append(stream.flush().content)
    return "".join(pieces), pieces


@pytest.fixture(scope="module")
def smol() -> tuple[TextModel, Tokenizer]:
    return TextModel(model_path()), Tokenizer.from_file(f"{model_path()}/tokenizer.json")


def saved(tokenizer: Tokenizer, directory: Path) -> tuple[TextModel, Tokenizer]:
    tokenizer.save(str(directory / "tokenizer.json"))
    return TextModel(directory), tokenizer


def sentencepiece_like(*, strip: bool) -> Tokenizer:
    """Words that begin with the space mark, and bytes for everything else."""
    vocabulary = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    vocabulary += [("▁hello", 0.0), ("▁world", 0.0), ("s", 0.0), ("▁▁", 0.0), ("é▁", 0.0), ("<unk>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=len(vocabulary) - 1, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.add_tokens(["<added>"])
    return tokenizer


def neighbours(kind: str) -> Tokenizer:
    """Vocabularies whose decoders look at a token's neighbours."""
    words = ["[UNK]", "hello", "##s", "world", ".", ",", "'", "do", "n't", "▁hi", "▁there", "x", "a</w>", "b"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    kinds = {
        "wordpiece": decoders.WordPiece(cleanup=True),
        "metaspace": decoders.Metaspace(),
        "bpe": decoders.BPEDecoder(),
    }
    if kind != "none":
        tokenizer.decoder = kinds[kind]  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(["[SEP]"])
    return tokenizer


def check_random(
    model: TextModel, tokenizer: Tokenizer, sequences: int, longest: int, ids: list[int]
) -> None:
    rng = random.Random(1)
    for _ in range(sequences):
        sequence = rng.choices(ids, k=rng.randrange(1, longest))
        expected = tokenizer.decode(sequence, skip_special_tokens=True)
        assert cut_and_feed(model, sequence, rng)[0] == expected, sequence
        assert model.decode(sequence) == expected
        assert model.decode(sequence, skip_special=False) == tokenizer.decode(
            sequence, skip_special_tokens=False
        )


@pytest.fixture(scope="module")
def hf() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(model_path())


def test_a_hundred_thousand_random_sequences(smol: tuple[TextModel, Tokenizer], hf: Any) -> None:
    """Byte for byte what `transformers` makes of them."""
    model, tokenizer = smol
    rng = random.Random(1)
    size = tokenizer.get_vocab_size()
    # Half of them of tokens that are not whole characters.
    broken = [i for i in range(size) if "\N{REPLACEMENT CHARACTER}" in model.token(i)[0]]
    assert len(broken) > 100
    sequences = [
        rng.choices(broken if number % 2 else range(size), k=rng.randrange(1, 12))
        for number in range(100_000)
    ]
    expected = hf.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for ids, whole in zip(sequences, expected, strict=True):
        stream, at, text = TextStream(model), 0, ""
        while at < len(ids):
            count = rng.randrange(1, 4)
            text += stream.feed(ids[at : at + count]).content
            at += count
        assert text + stream.flush().content == whole, ids


def test_long_sequences_like_transformers(smol: tuple[TextModel, Tokenizer], hf: Any) -> None:
    model, tokenizer = smol
    rng = random.Random(3)
    for _ in range(1000):
        ids = rng.choices(range(tokenizer.get_vocab_size()), k=rng.randrange(1, 60))
        assert cut_and_feed(model, ids, rng)[0] == hf.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


@pytest.mark.parametrize("strip", [False, True])
def test_byte_fallback(tmp_path: Path, strip: bool) -> None:
    model, tokenizer = saved(sentencepiece_like(strip=strip), tmp_path)
    size = tokenizer.get_vocab_size()
    check_random(model, tokenizer, 2000, 20, list(range(size + 3)))
    # Mostly bytes that may be characters, and spaces at the start.
    likely = [*"你é🧿 ".encode(), *range(256, size)]
    check_random(model, tokenizer, 2000, 20, likely)
    hello, world, plural = 256, 257, 258
    ids = ([hello, world, plural, *"你🧿".encode(), hello, *"é".encode()]) * 20
    text, pieces = cut_and_feed(model, ids, random.Random(1))
    assert text == tokenizer.decode(ids)
    assert text.lstrip().startswith("hello worlds你🧿 helloé hello")
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert model.token(hello) == (" hello", b" hello")
    assert model.token(0xE4) == ("\N{REPLACEMENT CHARACTER}", b"\xe4")


def test_long_run_of_bytes_does_not_wait_for_ever(tmp_path: Path) -> None:
    model, tokenizer = saved(sentencepiece_like(strip=True), tmp_path)
    ids = list("你".encode()) * 400
    stream = TextStream(model)
    shown = "".join(stream.feed([token]).content for token in ids)
    assert len(shown) > 300
    assert shown + stream.flush().content == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["wordpiece", "metaspace", "bpe", "none"])
def test_decoders_that_look_at_neighbours(tmp_path: Path, kind: str) -> None:
    model, tokenizer = saved(neighbours(kind), tmp_path)
    check_random(model, tokenizer, 500, 60, list(range(tokenizer.get_vocab_size() + 1)))


def test_random_unicode(smol: tuple[TextModel, Tokenizer]) -> None:
    model, tokenizer = smol
    rng = random.Random(2)
    ranges = [(0x20, 0x7F), (0xA0, 0x17F), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (0x300, 0x36F)]
    for _ in range(1000):
        source = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(60))
        ids = tokenizer.encode(source, add_special_tokens=False).ids
        assert model.encode(source) == ids
        text, pieces = cut_and_feed(model, ids, rng)
        assert text == source
        # No piece shows half a character that a later one completes.
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        assert b"".join(model.token(token)[1] for token in ids) == source.encode()


def test_character_is_held_until_whole(smol: tuple[TextModel, Tokenizer]) -> None:
    model, _ = smol
    ids = model.encode("🧿")
    assert len(ids) > 1
    stream = TextStream(model)
    assert [stream.feed([token]).content for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.feed(ids[-1:]).content == "🧿"
    assert not stream.flush()


def test_unfinished_character_at_the_end(smol: tuple[TextModel, Tokenizer]) -> None:
    model, tokenizer = smol
    ids = model.encode("a🧿")[:-1]
    stream = TextStream(model)
    assert stream.feed(ids).content + stream.flush().content == tokenizer.decode(ids)


def test_special_and_unknown_tokens(smol: tuple[TextModel, Tokenizer]) -> None:
    model, tokenizer = smol
    end = model.token_id("<|im_end|>")
    assert end is not None
    assert end == tokenizer.token_to_id("<|im_end|>")
    assert model.is_special(end)
    assert model.vocab_size == tokenizer.get_vocab_size()
    assert not TextStream(model).feed([end, end, 2**31])
    assert TextStream(model, skip_special=False).feed([end]).content == "<|im_end|>"
    assert model.token(end) == ("<|im_end|>", b"<|im_end|>")
    assert model.token(2**31) == ("", b"")
    assert model.token_id("no such token") is None


def test_every_byte_has_a_token(tmp_path: Path) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(alphabet))}, []))
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    model, _ = saved(tokenizer, tmp_path)
    assert {model.token(token)[1] for token in range(256)} == {bytes([byte]) for byte in range(256)}


def test_bytes_of_sentence_pieces(tmp_path: Path) -> None:
    pieces = ["▁the", "<0xE4>", "x▁y", "<0xZZ>"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken("<▁s>")])
    model, _ = saved(tokenizer, tmp_path)
    expected = [b" the", b"\xe4", b"x y", b"<0xZZ>", b"< s>", b""]
    # The decoder reads added tokens like all others.
    assert tokenizer.decode([4], skip_special_tokens=False) == "< s>"
    assert [model.token(i)[1] for i in range(6)] == expected
