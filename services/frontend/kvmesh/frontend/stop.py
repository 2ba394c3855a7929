"""Stop strings: the answer ends before the first of them, wherever tokens cut it."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one text as it grows; holds back an end that may become a stop string."""

    __slots__ = ("_held", "_longest", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        # The stop string that ended the text.
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """What of the text so far is safe to show. After a match (`matched`), nothing more is."""
        if not self._stops:
            return piece
        if self.matched is not None:
            return ""
        text = self._held + piece
        at = len(text)
        for stop in self._stops:
            found = text.find(stop)
            if 0 <= found < at:
                at, self.matched = found, stop
        if self.matched is not None:
            self._held = ""
            return text[:at]
        keep = self._open_end(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once the text has ended."""
        held, self._held = self._held, ""
        return held

    def _open_end(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
