"""Token ids to text, a few at a time, with the text of a full decode."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

# An open end decodes to U+FFFD: one with byte-level vocabularies; with byte-fallback ones all bytes that
# stand together, whole characters before it included. More of them are no open end but garbage,
# which need not wait.
_LONGEST_OPEN_END = 64
# Bytes of a character without its last.
_LONGEST_CUT = 3
# Tokens decoded again with every step, beyond which the window moves on.
_WINDOW = 16
_CUT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Decodes one output. What `feed` and `flush` return adds up to the decoding of all ids at once.

    A token's text depends on its neighbours (bytes of one character, leading spaces), so a window of
    the last ids is decoded together, and what may still change is held back.
    """

    __slots__ = ("_clean", "_sent", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        # Characters of the window's text already returned.
        self._sent = 0
        # Ids at the window's start whose text ended with a whole character when they were its end.
        self._clean = 0

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text these ids make certain; may be empty."""
        before = self._clean
        self._window.extend(token_ids)
        text = self._tokenizer.decode(self._window, skip_special_tokens=True)
        end = len(text)
        if text.endswith(_CUT):
            open_end = end - len(text.rstrip(_CUT))
            end -= open_end if open_end <= _LONGEST_OPEN_END else _LONGEST_CUT
        else:
            self._clean = len(self._window)
        piece = text[self._sent : end]
        self._sent = max(self._sent, end)
        if before and self._clean == len(self._window) > _WINDOW:
            self._forget(before)
        return piece

    def flush(self) -> str:
        """The rest, once no more ids come; an unfinished character is U+FFFD."""
        text = self._tokenizer.decode(self._window, skip_special_tokens=True)
        piece = text[self._sent :]
        self._window.clear()
        self._sent = self._clean = 0
        return piece

    def _forget(self, count: int) -> None:
        """Drop the first `count` ids; those left stay as the context of what follows."""
        del self._window[:count]
        self._clean = len(self._window)
        self._sent = len(self._tokenizer.decode(self._window, skip_special_tokens=True))
