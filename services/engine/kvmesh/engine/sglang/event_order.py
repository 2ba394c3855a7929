"""The order of the engine's KV events: complete, or plainly declared lost.

SGLang numbers its batches from 0 and keeps the last 10,000 for replay. A missing number is asked for; what
cannot be had any more is answered by BlocksCleared: whatever was known may have been removed meanwhile, so it
is forgotten, never guessed. Every replay begins with the last batch that is known: if the engine has another
one under that number, or none, it is another engine, and everything is read from its beginning.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from kvmesh.engine.contract import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from kvmesh.engine.sglang.salted_names import SaltedNames

_DEVICE = (None, "GPU")
_U64 = (1 << 64) - 1


class BlockStored(msgspec.Struct, tag=True, gc=False):
    block_hashes: list[int]
    parent_block_hash: int | None = None
    medium: str | None = None
    # Only salted blocks are named anew, from their tokens; others' are not worth decoding.
    token_ids: msgspec.Raw = msgspec.Raw(b"")
    block_size: int = 0
    cache_salt: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, gc=False):
    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, gc=False):
    pass


class _Batch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


_decode = msgspec.msgpack.Decoder(_Batch).decode
_decode_tokens = msgspec.msgpack.Decoder(list[int]).decode


def translate(payload: bytes, names: SaltedNames) -> list[KvEvent]:
    """One published batch: the device tier's changes in the mesh's hashes, unsigned 64-bit numbers.

    Salted blocks that cannot be named are left out.
    """
    events: list[KvEvent] = []
    for event in _decode(payload).events:
        match event:
            case BlockStored(hashes, parent, medium) if medium in _DEVICE:
                unsigned = [h & _U64 for h in hashes]
                first = None if parent is None else parent & _U64
                if event.cache_salt is not None:
                    tokens = _decode_tokens(event.token_ids)
                    named = names.stored(unsigned, first, tokens, event.block_size, event.cache_salt)
                    if named is None:
                        continue
                    unsigned, first = named
                events.append(BlocksStored(unsigned, first))
            case BlockRemoved(hashes, medium) if medium in _DEVICE:
                events.append(BlocksRemoved(names.removed([h & _U64 for h in hashes])))
            case AllBlocksCleared():
                names.cleared()
                events.append(BlocksCleared())
    return events


class EventOrder:
    """Takes batches as they come, live and replayed, and gives their events to `emit` in order.

    `ask(first)` requests a replay from number `first` on; its batches go to `replayed`, its end to
    `answered`. At most one request is under way.
    """

    def __init__(self, ask: Callable[[int], None], emit: Callable[[list[KvEvent]], None]) -> None:
        self._ask = ask
        self._emit = emit
        self._names = SaltedNames()
        self._next = 0
        # The batch before the next.
        self._last = b""
        # Batches that came before ones that are missing.
        self._early: dict[int, bytes] = {}
        self._asking = False
        # Nothing is applied until the replay under way has shown that the engine is the same.
        self._doubted = False
        # An engine has been left behind; the next one must be read from its beginning.
        self._restarted = False
        # Missing numbers that were published before the replay was asked for: it has them, or nobody has.
        self._hopeless = range(0)
        # Batches declared lost, and engines recognised as new.
        self.lost = 0
        self.restarts = 0

    def live(self, number: int, payload: bytes) -> None:
        """A batch as it was published."""
        if number >= self._next:
            self._early[number] = payload
            self._drain()
        elif payload == self._last:
            return
        else:
            # A duplicate, or the number is used anew.
            self.check()
        if self._early:
            self.check()

    def replayed(self, number: int, payload: bytes) -> None:
        """A batch of the replay asked for."""
        if self._doubted and number == self._next - 1:
            if payload == self._last:
                self._doubted = False
            else:
                self._restart()
        elif number >= self._next:
            self._early[number] = payload
        self._drain()

    def answered(self) -> None:
        """The replay is over."""
        self._asking = False
        if self._doubted:
            self._restart()
        if self._early and self._next in self._hopeless:
            first = min(self._early)
            self.lost += first - self._next
            self._next = first
            self._names.cleared()
            self._emit([BlocksCleared("lost")])
            self._drain()
        if self._early or self._restarted:
            self.check()

    def check(self) -> None:
        """Ask the engine for whatever it has beyond what is known, and whether it is the same engine."""
        if self._asking:
            return
        self._asking = True
        self._restarted = False
        self._doubted = self._next > 0
        self._hopeless = range(self._next, min(self._early, default=self._next))
        self._ask(max(self._next - 1, 0))

    def _drain(self) -> None:
        while not self._doubted and (payload := self._early.pop(self._next, None)) is not None:
            self._next += 1
            self._last = payload
            self._emit(translate(payload, self._names))

    def _restart(self) -> None:
        self.restarts += 1
        self._restarted = True
        self._doubted = False
        self._early.clear()
        self._next = 0
        self._last = b""
        self._hopeless = range(0)
        self._names.cleared()
        self._emit([BlocksCleared("restart")])
