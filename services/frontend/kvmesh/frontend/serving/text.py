"""A session's tokens as text: pieces fit to be sent, and why the answer ended."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from kvmesh.core import TextDelta, TextModel, TextStream
from kvmesh.frontend.serving.attempt import Output
from kvmesh.frontend.serving.calls import CallDelta, NamedCall
from kvmesh.frontend.serving.scores import Score, Scores, score
from kvmesh.frontend.serving.session import Session
from kvmesh.v1.engine_pb2 import FINISH_REASON_STOP


@dataclass(slots=True)
class Delta:
    """What an answer has grown by. `finish_reason` is set in the last one, and only there."""

    text: str = ""
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()
    scores: Sequence[Score] = ()
    finish_reason: str = ""


@dataclass(slots=True)
class Reading:
    """What an answer's text is looked through for; names of formats as in docs/reference/text.md."""

    # Calls of these functions; without a format they are text.
    tool_format: str | None = None
    functions: Sequence[str] = ()
    # Without a format reasoning is text.
    reasoning_format: str | None = None
    # Whether the answer begins within reasoning; None: as the format's name says.
    in_reasoning: bool | None = None
    # All of the text is the arguments of this function.
    named_function: str | None = None
    # The answer ends with its first call.
    one_call: bool = False
    # The answer is calls: text between them, and one that length cuts before its name, is nobody's to read.
    only_calls: bool = False


@dataclass(slots=True)
class TextOptions:
    """How an answer's tokens become what the client gets."""

    stops: Sequence[str] = ()
    # The prompt comes first, spelled so, with its log probabilities where they were asked for.
    echo: str | None = None
    # Nothing but the prompt was asked for.
    silent: bool = False
    reading: Reading = field(default_factory=Reading)


class Outlet(Protocol):
    """Where pieces of an answer go as they come up, past the task that asks for them, while that waits."""

    def open(self) -> bool:
        """Whether it takes one now. Where not, the task gets it."""
        ...

    def put(self, delta: Delta) -> None:
        """Not the last one of the answer. Must not block."""
        ...


class TextAnswer:
    """The text of one answer, of that number in its request."""

    def __init__(self, session: Session, options: TextOptions, number: int = 0) -> None:
        self.session = session
        self._number = number
        self._options = options
        reading, stops = options.reading, list(options.stops)
        self._model = session.call.model.tokenizer.text
        self._stream = TextStream(
            self._model,
            stops,
            reading.tool_format,
            list(reading.functions),
            reading.reasoning_format,
            reading.in_reasoning,
        )
        named = reading.named_function
        self._named = NamedCall(named) if named is not None else None
        self._scored = session.call.sampling.HasField("top_logprobs")
        self._scores = _ScoredText(self._model, stops) if self._scored else None
        self._called = False
        # Whether a call has begun that the client does not want.
        self._enough = False

    @property
    def matched(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stream.matched

    @property
    def reasoning_tokens(self) -> int:
        return self._stream.reasoning_tokens

    async def deltas(self, outlet: Outlet | None = None) -> AsyncGenerator[tuple[int, Delta]]:
        """The answer as it comes, with its number; starts the session, and ends it.

        Ends at a stop string, engines cancelled. What `outlet` takes does not come here.
        Raises KvmeshError when the answer cannot be completed.
        """
        session, options, number = self.session, self._options, self._number
        # Scored text is shown later than it is written, which is too much to do on the way.
        take = partial(self._take, outlet) if outlet is not None and not self._scored else None
        await session.start()
        if options.echo is not None:
            yield number, self._prompt(options.echo)
        if options.silent:
            self.close()
            yield number, Delta(finish_reason="length")
            return
        while not session.finished:
            delta = self._feed(await session.next(take))
            if delta is not None:
                yield number, delta
            if self._over:
                break
        delta = self._end()
        self.close()
        yield number, delta

    def close(self) -> None:
        """End the session; idempotent."""
        self.session.reasoning_tokens = self.reasoning_tokens
        self.session.close()

    @property
    def _over(self) -> bool:
        """Whether the client wants no more of it."""
        return self._stream.matched is not None or self._enough

    def _take(self, outlet: Outlet, tokens: Sequence[int]) -> bool:
        if not outlet.open():
            return False
        delta = self._delta(self._stream.feed(tokens), ())
        if delta is not None:
            outlet.put(delta)
        if self._over:
            self.session.interrupt()
        return True

    def _feed(self, output: Output) -> Delta | None:
        tokens = output.token_ids
        finish = self.session.finish
        if finish is not None and tokens and finish.HasField("matched_token_id"):
            # The token that ended the answer is not part of its text.
            tokens = tokens[:-1] if tokens[-1] == finish.matched_token_id else tokens
        if not tokens:
            return None
        scores = self._scores.feed(Output(tokens, output.logprobs)) if self._scores is not None else ()
        return self._delta(self._stream.feed(tokens), scores)

    def _end(self) -> Delta:
        stream = self._stream
        rest = stream.flush()
        stopped = stream.matched is not None
        scores = self._scores.flush() if self._scores is not None else ()
        delta = self._delta(rest, scores) or Delta()
        finish = self.session.finish
        stopped = stopped or self._enough or (finish is not None and finish.reason == FINISH_REASON_STOP)
        delta.finish_reason = ("tool_calls" if self._called else "stop") if stopped else "length"
        return delta

    def _delta(self, piece: TextDelta, scores: Sequence[Score]) -> Delta | None:
        if not piece and not scores:
            return None
        text = piece.content
        if self._named is not None:
            text, calls = "", self._named.feed(text)
        else:
            calls = [CallDelta(index, i or "", name or "", a) for index, i, name, a in piece.tool_calls]
            if self._options.reading.only_calls:
                text = ""
            if self._options.reading.one_call:
                text = "" if self._enough else text
                self._enough = self._enough or any(call.index for call in calls)
                calls = [call for call in calls if not call.index]
        self._called = self._called or bool(calls)
        if not (text or piece.reasoning or calls or scores):
            return None
        return Delta(text, piece.reasoning, calls, scores)

    def _prompt(self, text: str) -> Delta:
        if self._scores is None:
            return Delta(text)
        self._scores.offset = len(text)
        logprobs = [None, *self.session.attempt.prompt_logprobs]
        spelled = TextStream(self._model)
        scores, start = [], 0
        for token, logprob in zip(self.session.call.token_ids, logprobs, strict=False):
            scores.append(score(self._model, token, logprob, start))
            start += len(spelled.feed((token,)).content)
        return Delta(text, scores=scores)


class _ScoredText:
    """Where in an answer each token's text begins, and when it is shown."""

    def __init__(self, model: TextModel, stops: list[str]) -> None:
        # All text as it is, and as far as no stop string can begin in it.
        self._all, self._safe = TextStream(model), TextStream(model, stops)
        self._scores = Scores(model)
        self._written = self._shown = 0
        self.offset = 0
        """characters before the answer"""

    def feed(self, output: Output) -> list[Score]:
        """Those of the tokens whose text can be shown now."""
        for i, token in enumerate(output.token_ids):
            logprob = output.logprobs[i] if i < len(output.logprobs) else None
            self._scores.add(token, logprob, self.offset + self._written)
            self._written += len(self._all.feed((token,)).content)
        self._shown += len(self._safe.feed(output.token_ids).content)
        return self._scores.take(self.offset + self._shown)

    def flush(self) -> list[Score]:
        """Those of the rest of the text, once no more tokens come."""
        self._safe.flush()
        return self._scores.rest() if self._safe.matched is None else []
