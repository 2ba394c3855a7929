"""The bytes each token stands for, from the ways vocabularies are written."""

from __future__ import annotations

import re

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Of one tokenizer's tokens. Computed when asked for and kept: the likely tokens come again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # The decoders that undo the byte alphabet name it.
        self._alphabet = _byte_alphabet() if "ByteLevel(" in repr(tokenizer.decoder) else None
        # Added tokens are written as they are.
        self._known = {
            number: token.content.encode() for number, token in tokenizer.get_added_tokens_decoder().items()
        }

    def of(self, token: int) -> bytes:
        """Empty for an id that the vocabulary has no token for."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._spell(self._tokenizer.id_to_token(token) or "")
        return known

    def _spell(self, piece: str) -> bytes:
        if self._alphabet is not None:
            letters = [self._alphabet.get(letter) for letter in piece]
            if None not in letters:
                return bytes(letter for letter in letters if letter is not None)
            return piece.encode()
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
