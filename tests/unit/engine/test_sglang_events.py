"""KV events over a real ZeroMQ publisher that drops what it is told to."""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import zmq
import zmq.asyncio

from fixtures.waiting import eventually
from kvmesh.core import event_namespace_seed, hash_tokens, namespace_seed
from kvmesh.engine.contract import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from kvmesh.engine.sglang.event_order import translate
from kvmesh.engine.sglang.events import KvEventStream
from kvmesh.engine.sglang.salted_names import SaltedNames

END = (-1).to_bytes(8, "big", signed=True)


def batch(*events: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode([0.0, events, 0])


def stored(*hashes: int, parent: int | None = None, **fields: Any) -> dict[str, Any]:
    event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": [1]}
    return event | {"block_size": 1, "lora_id": None} | fields


class Publisher:
    """Publishes and replays as SGLang's publisher does."""

    def __init__(self, directory: Path) -> None:
        self.context = zmq.asyncio.Context()
        self.live = self.context.socket(zmq.XPUB)
        self.live.bind(f"ipc://{directory}/events")
        self.replay = self.context.socket(zmq.ROUTER)
        self.replay.bind(f"ipc://{directory}/replay")
        self.kept: dict[int, bytes] = {}
        self.asked: list[int] = []
        self.number = 0
        # Cleared, requests for a replay are read and answered with what there is once it is set again.
        self.answering = asyncio.Event()
        self.answering.set()
        self._serving = asyncio.create_task(self._serve())

    async def publish(self, payload: bytes, *, lose: bool = False, keep: bool = True) -> None:
        if keep:
            self.kept[self.number] = payload
        if not lose:
            await self.live.send_multipart([b"kv", self.number.to_bytes(8, "big"), payload])
        self.number += 1

    async def _serve(self) -> None:
        while True:
            client, _empty, start = await self.replay.recv_multipart()
            first = int.from_bytes(start, "big")
            self.asked.append(first)
            known = sorted(self.kept.items())
            await self.answering.wait()
            for number, payload in known:
                if number >= first:
                    await self.replay.send_multipart([client, b"", b"kv", number.to_bytes(8, "big"), payload])
            await self.replay.send_multipart([client, b"", b"", END, b""])

    def close(self) -> None:
        self._serving.cancel()
        self.context.destroy(linger=0)


class Follower:
    """A stream and all it has yielded."""

    def __init__(self, directory: Path) -> None:
        self.context = zmq.Context()
        self.stream = KvEventStream(self.context, str(directory))
        self.events: list[KvEvent] = []
        self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for events in self.stream.events():
            self.events += events

    def close(self) -> None:
        self._following.cancel()
        self.stream.close()
        self.context.term()


@pytest_asyncio.fixture
async def publisher(tmp_path: Path) -> AsyncIterator[Publisher]:
    publisher = Publisher(tmp_path)
    yield publisher
    publisher.close()


@pytest_asyncio.fixture
async def follower(publisher: Publisher, tmp_path: Path) -> AsyncIterator[Follower]:
    follower = Follower(tmp_path)
    await publisher.live.recv()  # the subscription
    await follower.stream.catch_up()
    yield follower
    follower.close()


def hashes(follower: Follower) -> list[int]:
    return [h for event in follower.events if isinstance(event, BlocksStored) for h in event.hashes]


async def test_events_come_in_order(publisher: Publisher, follower: Follower) -> None:
    for number in range(200):
        await publisher.publish(batch(stored(number)))
    await eventually(lambda: len(follower.events) == 200)
    assert hashes(follower) == list(range(200))
    assert publisher.asked == [0]


async def test_what_was_published_before_is_caught_up_with(publisher: Publisher, tmp_path: Path) -> None:
    for number in range(5):
        await publisher.publish(batch(stored(number)))
    follower = Follower(tmp_path)
    await follower.stream.catch_up()
    await eventually(lambda: hashes(follower) == [0, 1, 2, 3, 4])
    follower.close()


async def test_a_gap_is_filled_in_place(publisher: Publisher, follower: Follower) -> None:
    for number in range(6):
        await publisher.publish(batch(stored(number)), lose=number in (2, 3))
    await eventually(lambda: len(follower.events) == 6)
    assert hashes(follower) == [0, 1, 2, 3, 4, 5]
    assert publisher.asked == [0, 1]
    assert follower.stream.lost_batches == 0


async def test_what_cannot_be_had_any_more_is_declared_lost(publisher: Publisher, follower: Follower) -> None:
    for number in range(6):
        gone = number in (2, 3)
        await publisher.publish(batch(stored(number)), lose=gone, keep=not gone)
    await eventually(lambda: len(follower.events) == 5)
    kinds = [type(event) for event in follower.events]
    assert kinds == [BlocksStored, BlocksStored, BlocksCleared, BlocksStored, BlocksStored]
    assert BlocksCleared("lost") in follower.events
    assert hashes(follower) == [0, 1, 4, 5]
    assert follower.stream.lost_batches == 2


async def test_what_went_missing_after_asking_is_asked_for_again(
    publisher: Publisher, follower: Follower
) -> None:
    publisher.answering.clear()
    await publisher.publish(batch(stored(0)), lose=True)
    await publisher.publish(batch(stored(1)))
    await eventually(lambda: len(publisher.asked) == 2)
    # The answer under way knows nothing of these.
    await publisher.publish(batch(stored(2)), lose=True)
    await publisher.publish(batch(stored(3)))
    await asyncio.sleep(0.05)
    publisher.answering.set()
    await eventually(lambda: len(follower.events) == 4)
    assert hashes(follower) == [0, 1, 2, 3]
    assert publisher.asked == [0, 0, 1]
    assert follower.stream.lost_batches == 0


async def test_duplicates_are_dropped(publisher: Publisher, follower: Follower) -> None:
    await publisher.publish(batch(stored(1)))
    await publisher.live.send_multipart([b"kv", (0).to_bytes(8, "big"), batch(stored(1))])
    await publisher.publish(batch(stored(2)))
    await eventually(lambda: len(follower.events) == 2)
    assert hashes(follower) == [1, 2]


async def test_an_engine_that_begins_anew_is_recognised(publisher: Publisher, follower: Follower) -> None:
    for number in range(4):
        await publisher.publish(batch(stored(number)))
    await eventually(lambda: len(follower.events) == 4)
    publisher.kept.clear()
    publisher.number = 0
    # The first of the new life does not arrive; the second has a number that was used.
    await publisher.publish(batch(stored(100)), lose=True)
    await publisher.publish(batch(stored(101)))
    await eventually(lambda: hashes(follower) == [0, 1, 2, 3, 100, 101])
    assert follower.events[4] == BlocksCleared("restart")
    await publisher.publish(batch(stored(102)))
    await eventually(lambda: hashes(follower)[-1] == 102)


async def test_a_new_engine_behind_the_same_socket_is_recognised(
    publisher: Publisher, tmp_path: Path
) -> None:
    follower = Follower(tmp_path)
    await publisher.live.recv()
    await follower.stream.catch_up()
    await publisher.publish(batch(stored(1)))
    await eventually(lambda: hashes(follower) == [1])
    publisher.close()
    second = Publisher(tmp_path)
    # Numbers go on where the last engine's ended; only the connection tells them apart.
    await second.publish(batch(stored(7)))
    await second.publish(batch(stored(8)))
    await eventually(lambda: hashes(follower) == [1, 7, 8], what=f"{follower.events}")
    assert BlocksCleared("restart") in follower.events
    follower.close()
    second.close()


def test_translation_keeps_the_device_tier_and_unsigned_hashes() -> None:
    payload = batch(
        stored(-1, 5, parent=-2, medium="GPU"),
        stored(7, medium="EXTERNAL"),
        {"type": "BlockRemoved", "block_hashes": [-1], "medium": "GPU"},
        {"type": "BlockRemoved", "block_hashes": [7], "medium": "CPU_PINNED"},
        {"type": "AllBlocksCleared"},
    )
    top = (1 << 64) - 1
    assert translate(payload, SaltedNames()) == [
        BlocksStored([top, 5], parent=top - 1),
        BlocksRemoved([top]),
        BlocksCleared(),
    ]


@pytest.mark.parametrize("pages", [1, 3])
def test_our_page_hash_is_sglangs(pages: int) -> None:
    """SHA-256 over the parent's digest and the page's tokens as little-endian 32-bit numbers."""
    tokens, size = list(range(100, 100 + 16 * pages)), 16
    expected, parent = [], b""
    for start in range(0, len(tokens), size):
        parent = hashlib.sha256(parent + array("I", tokens[start : start + size]).tobytes()).digest()
        expected.append(int.from_bytes(parent[:8], "big"))
    assert hash_tokens(tokens, size).tolist() == expected


def salted(tokens: list[int], before: int = 0, salt: str = "tenant:acme") -> dict[str, Any]:
    """SGLang's event of a salted chain's pages from number `before` on, of two tokens each."""
    hashes = hash_tokens(tokens, 2, event_namespace_seed(salt)).view("int64").tolist()
    parent = hashes[before - 1] if before else None
    fields = {"token_ids": tokens[2 * before :], "block_size": 2, "cache_salt": salt, "medium": "GPU"}
    return stored(*hashes[before:], parent=parent, **fields)


def removed(*hashes: int) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU"}


def test_salted_blocks_get_the_names_that_the_store_has() -> None:
    tokens = list(range(10, 20))
    names = hash_tokens(tokens, 2, namespace_seed(cache_salt="tenant:acme")).tolist()
    known = SaltedNames()
    begun = salted(tokens[:6])
    assert translate(batch(begun), known) == [BlocksStored(names[:3], None)]
    # A node that was split, or grew: the chain goes on from what is known.
    assert translate(batch(salted(tokens, 3)), known) == [BlocksStored(names[3:], names[2])]
    assert translate(batch(salted(tokens[:6], 1)), known) == [BlocksStored(names[1:3], names[0])]
    gone = removed(begun["block_hashes"][2], 77)
    assert translate(batch(gone), known) == [BlocksRemoved([names[2], 77])]
    assert translate(batch(stored(5, parent=7, medium="GPU")), known) == [BlocksStored([5], 7)]


def test_salted_chains_of_other_salts_and_of_none_share_no_name() -> None:
    tokens = list(range(8))
    found = [translate(batch(salted(tokens, salt=salt)), SaltedNames()) for salt in ("a", "b", "")]
    found.append([BlocksStored(hash_tokens(tokens, 2).tolist(), None)])
    blocks = [hash_ for (event,) in found if isinstance(event, BlocksStored) for hash_ in event.hashes]
    assert len(set(blocks)) == len(blocks) == 16


def test_a_salted_chain_whose_beginning_was_lost_is_left_out() -> None:
    tokens = list(range(8))
    known = SaltedNames()
    assert translate(batch(salted(tokens, 2)), known) == []
    translate(batch(salted(tokens)), known)
    assert translate(batch({"type": "AllBlocksCleared"}), known) == [BlocksCleared()]
    assert translate(batch(salted(tokens, 2)), known) == []
