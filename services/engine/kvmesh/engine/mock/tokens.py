"""What the mock engine says: each next token is a pure function of all tokens before it and the sampling."""

from __future__ import annotations

import array
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import structlog

from kvmesh.engine.contract import Finish, FinishReason, Logprob, Sampling

log = structlog.get_logger()

# One token in so many ends the text.
END_ODDS = 1024
# Tokens that have a chance where log probabilities or biases are asked for.
_CANDIDATES = 32
# A word with the space before it, as byte-level BPE and SentencePiece write it.
_WORD = re.compile(r"[Ġ▁][a-z]{2,}")


class Vocabulary:
    """The ids worth saying, and the ones that end a text."""

    def __init__(self, words: Sequence[int], eos: tuple[int, ...]) -> None:
        self.words = tuple(words)
        self.eos = eos

    @classmethod
    def load(cls, model_path: str, size: int) -> Vocabulary:
        """The words below id `size` of the model directory's tokenizer.

        Without a readable tokenizer.json every id but the first 256 is a word, and 2 ends a text.
        """
        directory = Path(model_path)
        eos = tuple(token for token in _eos(directory) if token < size) or (min(2, size - 1),)
        words = [token for token in _words(directory) if token < size and token not in eos]
        if not words:
            log.warning("no words in the model's tokenizer, using any token", model_path=model_path)
            words = [token for token in range(min(256, size // 2), size) if token not in eos]
        return cls(words, eos)


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def _eos(directory: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        value = _read(directory / name).get("eos_token_id")
        if value is not None:
            return value if isinstance(value, list) else [value]
    return []


def _words(directory: Path) -> list[int]:
    pieces = _read(directory / "tokenizer.json").get("model", {}).get("vocab", {})
    if isinstance(pieces, list):
        # Unigram models list [piece, score]; the id is the position.
        pieces = {piece: number for number, (piece, _) in enumerate(pieces)}
    return sorted(number for piece, number in pieces.items() if _WORD.fullmatch(piece))


class TokenSource:
    """The continuation of one text, token by token.

    The state is a hash of everything so far, so that a text continues alike wherever it is taken up again.
    """

    __slots__ = ("_bias", "_eos", "_hash", "_top", "_words", "logprob")

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int], sampling: Sampling) -> None:
        self._words = vocabulary.words
        self._eos: tuple[int, ...] = () if sampling.ignore_eos else vocabulary.eos
        self._bias = sampling.logit_bias
        self._top = sampling.top_logprobs
        # Of the last token, where the sampling asks for it.
        self.logprob: Logprob | None = None
        key = b""
        if sampling.temperature > 0:
            choice = (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed)
            key = hashlib.sha256(repr(choice).encode()).digest()
        self._hash = hashlib.blake2b(array.array("I", prompt).tobytes(), digest_size=8, key=key)

    def next(self, *, may_end: bool = True) -> int:
        """The token that follows; one that ends the text only if it `may_end`."""
        number = int.from_bytes(self._hash.copy().digest(), "little")
        ends = self._eos and may_end and number % END_ODDS == 0
        token = self._eos[0] if ends else self._words[(number >> 16) % len(self._words)]
        if self._bias:
            logits = self._logits(number, token)
            token = max(logits, key=logits.__getitem__)
        self.append(token)
        return token

    def append(self, token: int) -> None:
        """Take up a token that may have been chosen elsewhere."""
        if self._top is not None:
            self.logprob = self._score(token, self._top)
        self._hash.update(token.to_bytes(4, "little"))

    def _logits(self, number: int, favourite: int) -> dict[int, float]:
        """A model's opinion on what follows: the favourite, some others, all else out of the question."""
        start = number >> 16
        logits = {favourite: float(_CANDIDATES)}
        for rank in range(1, _CANDIDATES):
            logits.setdefault(self._words[(start + rank) % len(self._words)], float(_CANDIDATES - rank))
        for token, bias in self._bias.items():
            logits[token] = logits.get(token, 0.0) + bias
        return logits

    def _score(self, token: int, top: int) -> Logprob:
        number = int.from_bytes(self._hash.copy().digest(), "little")
        logits = self._logits(number, self._words[(number >> 16) % len(self._words)])
        logits.setdefault(token, float(_CANDIDATES))
        total = math.log(sum(math.exp(logit) for logit in logits.values()))
        likely = sorted(logits.items(), key=lambda item: -item[1])[:top]
        return Logprob(logits[token] - total, tuple((one, logit - total) for one, logit in likely))


def prompt_logprobs(vocabulary: Vocabulary, prompt: Sequence[int], sampling: Sampling) -> list[Logprob]:
    """Of the prompt's tokens but the first."""
    source = TokenSource(vocabulary, prompt[:1], sampling)
    scores = []
    for token in prompt[1:]:
        source.append(token)
        assert source.logprob is not None, "prompt_logprobs needs top_logprobs"
        scores.append(source.logprob)
    return scores


def finish_after(
    sampling: Sampling, eos: tuple[int, ...], token: int, generated: int, limit: int
) -> Finish | None:
    """How a request ends with its `generated`-th token, if it does; `limit` is the most it may have."""
    if generated >= sampling.min_new_tokens and (
        token in sampling.stop_token_ids or (token in eos and not sampling.ignore_eos)
    ):
        return Finish(FinishReason.STOP, matched_token_id=token)
    return Finish(FinishReason.LENGTH) if generated >= limit else None
