"""The bytes of tokens, for each way in which vocabularies are written."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fixtures.frontend import model_path
from kvmesh.frontend.token_bytes import TokenBytes

TEXTS = [
    "The capital of France is Paris.",
    "🗼 你好 é\u0301\n\ttabs  spaces",
    "<|im_start|>user\nx<|im_end|>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_texts_tokens_are_the_texts(text: str) -> None:
    tokenizer = Tokenizer.from_file(f"{model_path()}/tokenizer.json")
    known = TokenBytes(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(known.of(token) for token in ids) == text.encode()


def test_every_byte_has_a_token() -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: i for i, letter in enumerate(sorted(alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    known = TokenBytes(tokenizer)
    assert {known.of(token) for token in range(256)} == {bytes([byte]) for byte in range(256)}


def test_sentence_pieces() -> None:
    pieces = ["▁the", "<0xE4>", "x▁y", "<0xZZ>"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken("<▁s>")])
    known = TokenBytes(tokenizer)
    assert [known.of(i) for i in range(6)] == [b" the", b"\xe4", b"x y", b"<0xZZ>", "<▁s>".encode(), b""]
