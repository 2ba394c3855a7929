"""A session's tokens as text: pieces fit to be sent, and why the answer ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from kvmesh.frontend.detokenizer import Detokenizer
from kvmesh.frontend.session import Session
from kvmesh.frontend.stop import StopStrings
from kvmesh.v1.engine_pb2 import FINISH_REASON_STOP


class TextAnswer:
    """The text of one answer. `finish_reason`, "stop" or "length", is set when `pieces` has ended."""

    def __init__(self, session: Session, stops: Sequence[str]) -> None:
        self.session = session
        self.finish_reason = ""
        self._detokenizer = Detokenizer(session.call.model.tokenizer.fast)
        self._stops = StopStrings(stops)

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes, never an empty piece. The session must have been started.

        Ends at a stop string, engines cancelled. Raises KvmeshError when the answer cannot be completed.
        """
        session = self.session
        while not session.finished:
            tokens = await session.next()
            finish = session.finish
            if finish is not None and tokens and finish.HasField("matched_token_id"):
                # The token that ended the answer is not part of its text.
                tokens = tokens[:-1] if tokens[-1] == finish.matched_token_id else tokens
            piece = self._stops.feed(self._detokenizer.feed(tokens)) if tokens else ""
            if piece:
                yield piece
            if self._stops.matched is not None:
                break
        if self._stops.matched is None:
            rest = self._stops.feed(self._detokenizer.flush())
            rest += self._stops.flush()
            if rest:
                yield rest
        stopped = self._stops.matched is not None or (
            session.finish is not None and session.finish.reason == FINISH_REASON_STOP
        )
        self.finish_reason = "stop" if stopped else "length"
        session.close()
