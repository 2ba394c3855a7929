"""A session's tokens as text: pieces fit to be sent, and why the answer ended."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from kvmesh.frontend.attempt import Output
from kvmesh.frontend.calls import CallDelta, CallParser
from kvmesh.frontend.detokenizer import Detokenizer
from kvmesh.frontend.scores import Score, Scores, score
from kvmesh.frontend.session import Session
from kvmesh.frontend.stop import StopStrings
from kvmesh.v1.engine_pb2 import FINISH_REASON_STOP


@dataclass(slots=True)
class Delta:
    """What an answer has grown by. `finish_reason` is set in the last one, and only there."""

    text: str = ""
    calls: Sequence[CallDelta] = ()
    scores: Sequence[Score] = ()
    finish_reason: str = ""


@dataclass(slots=True)
class TextOptions:
    """How an answer's tokens become what the client gets."""

    stops: Sequence[str] = ()
    # The prompt comes first, spelled so, with its log probabilities where they were asked for.
    echo: str | None = None
    # Nothing but the prompt was asked for.
    silent: bool = False
    # The answer is calls.
    parser: CallParser | None = None


class TextAnswer:
    """The text of one answer."""

    def __init__(self, session: Session, options: TextOptions) -> None:
        self.session = session
        self._options = options
        self._tokenizer = session.call.model.tokenizer
        self._detokenizer = Detokenizer(self._tokenizer.fast)
        self._stops = StopStrings(options.stops)
        self._scored = session.call.sampling.HasField("top_logprobs")
        self._scores = Scores(self._tokenizer.vocabulary) if self._scored else None
        self._offset = 0
        self._written = 0
        self._shown = 0
        self._called = False

    @property
    def matched(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stops.matched

    async def deltas(self) -> AsyncGenerator[Delta]:
        """The answer as it comes; starts the session, and ends it. Ends at a stop string, engines cancelled.

        Raises KvmeshError when the answer cannot be completed.
        """
        session, options = self.session, self._options
        await session.start()
        if options.echo is not None:
            yield self._prompt(options.echo)
        if options.silent:
            session.close()
            yield Delta(finish_reason="length")
            return
        while not session.finished:
            output = await session.next()
            delta = self._feed(output)
            if delta is not None:
                yield delta
            if self._stops.matched is not None:
                break
        delta = self._end()
        session.close()
        yield delta

    def _feed(self, output: Output) -> Delta | None:
        tokens = output.token_ids
        finish = self.session.finish
        if finish is not None and tokens and finish.HasField("matched_token_id"):
            # The token that ended the answer is not part of its text.
            tokens = tokens[:-1] if tokens[-1] == finish.matched_token_id else tokens
        if not tokens:
            return None
        if self._scores is None:
            return self._delta(self._stops.feed(self._detokenizer.feed(tokens)), ())
        text = ""
        for i, token in enumerate(tokens):
            logprob = output.logprobs[i] if i < len(output.logprobs) else None
            self._scores.add(token, logprob, self._offset + self._written)
            piece = self._detokenizer.feed((token,))
            self._written += len(piece)
            text += self._stops.feed(piece)
        self._shown += len(text)
        return self._delta(text, self._scores.take(self._offset + self._shown))

    def _end(self) -> Delta:
        text, scores = "", []
        if self._stops.matched is None:
            text = self._stops.feed(self._detokenizer.flush())
            text += self._stops.flush()
            if self._scores is not None and self._stops.matched is None:
                scores = self._scores.rest()
        delta = self._delta(text, scores) or Delta()
        finish = self.session.finish
        stopped = self._stops.matched is not None or (
            finish is not None and finish.reason == FINISH_REASON_STOP
        )
        delta.finish_reason = ("tool_calls" if self._called else "stop") if stopped else "length"
        return delta

    def _delta(self, text: str, scores: Sequence[Score]) -> Delta | None:
        if self._options.parser is not None:
            calls = self._options.parser.feed(text)
            self._called = self._called or bool(calls)
            return Delta(calls=calls, scores=scores) if calls or scores else None
        return Delta(text, scores=scores) if text or scores else None

    def _prompt(self, text: str) -> Delta:
        self._offset = len(text)
        if not self._scored:
            return Delta(text)
        logprobs = [None, *self.session.attempt.prompt_logprobs]
        spelled = Detokenizer(self._tokenizer.fast)
        scores, start = [], 0
        for token, logprob in zip(self.session.call.token_ids, logprobs, strict=False):
            scores.append(score(self._tokenizer.vocabulary, token, logprob, start))
            start += len(spelled.feed((token,)))
        return Delta(text, scores=scores)
