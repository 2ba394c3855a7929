"""Brings what engines of this node ask for and only others have, while their requests wait."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import structlog

from kvmesh.common.tasks import cancel
from kvmesh.core import StoreServer
from kvmesh.kvbm.fetching import Fetching, hashes_of
from kvmesh.kvbm.neighbours import Neighbours

if TYPE_CHECKING:
    from kvmesh.core import StoreWanted

log = structlog.get_logger()

# How long the waiting thread stays in one wait: the end of the process may have to wait for that.
WAIT_S = 0.5
# How often it is looked whether there is a store nobody has spoken to yet.
GREET_S = 1.0


class Bringing:
    """Belongs to one event loop; the store tells it of blocks on a thread of its own."""

    def __init__(self, store: StoreServer, fetching: Fetching, neighbours: Neighbours) -> None:
        self._store = store
        self._fetching = fetching
        self._neighbours = neighbours
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvbm-wanted")
        self._following: asyncio.Task[None] | None = None
        self._greeting: asyncio.Task[None] | None = None
        self._under_way: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """From now on engines are told to wait for what comes."""
        self._store.look_elsewhere(self._neighbours.index)
        self._following = asyncio.create_task(self._follow(), name="kvbm-wanted")
        self._greeting = asyncio.create_task(self._greet(), name="kvbm-greet")

    async def close(self) -> None:
        await cancel(self._following, self._greeting, *self._under_way)
        self._thread.shutdown()

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            for wanted in await loop.run_in_executor(self._thread, self._store.wanted, WAIT_S):
                task = asyncio.create_task(self._bring(wanted), name="kvbm-bring")
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)

    async def _greet(self) -> None:
        """Making an agent, and two of them meeting, takes longer than most prompts do."""
        met: set[str] = set()
        while True:
            known = set(self._neighbours.addresses())
            met &= known
            for address in known - met:
                namespaces = await asyncio.to_thread(self._store.namespaces, "")
                # A store knows others as soon as an engine has told it of its blocks.
                if namespaces and await self._fetching.greet(address, namespaces[0]):
                    met.add(address)
            await asyncio.sleep(GREET_S)

    async def _bring(self, wanted: StoreWanted) -> None:
        number, namespace, parent, digests, within_s = wanted
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        try:
            hashes = hashes_of(digests)
            source, depth = self._neighbours.best(hashes)
            missing = len(hashes)
            if source:
                missing -= depth
                missing += await self._fetching.fetch(source, namespace, parent, hashes[:depth], within_s)
            left = until - loop.time()
            if missing and left > 0 and "network" in self._store.tiers:
                await asyncio.to_thread(self._store.bring, namespace, parent, digests, left)
        except Exception:
            log.exception("wanted blocks not brought", model=namespace[0][0])
        finally:
            # Engines that wait look again.
            self._store.settle(number)
