"""NIXL reads out of other stores' arenas into this one's."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import structlog

from kvmesh.core import StoreServer

log = structlog.get_logger()

# The longest wait of NIXL's progress thread between two looks, in microseconds; 0, the binding's own choice,
# takes a whole core. Events wake it in any case.
PROGRESS_US = 5_000
# Between two looks at a read under way.
POLL_S = 0.0005
# How long a read that was given up may go on writing, at most, before it is said so.
LINGER_S = 30.0

_T = TypeVar("_T")


class TransferError(Exception):
    """NIXL could not read; what has been written so far means nothing."""


class Link:
    """This store's NIXL agent, made and given the whole arena at first use. Belongs to one event loop.

    NIXL is called on one thread alone. The store must live until `close`.
    """

    def __init__(self, store: StoreServer) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvbm-nixl")
        self._agent: Any = None
        self._name = ""
        self._metadata = b""
        self._peers: set[str] = set()

    async def introduce(self) -> tuple[str, bytes]:
        """This agent's name and metadata. Raises TransferError."""
        await self._call(self._open)
        return self._name, self._metadata

    def knows(self, peer: str) -> bool:
        return peer in self._peers

    async def meet(self, peer: str, metadata: bytes) -> None:
        """Be able to read from an agent. Raises TransferError."""

        def add() -> None:
            self._open()
            name = self._agent.add_remote_agent(metadata)
            name = name.decode() if isinstance(name, bytes) else name
            if name != peer:
                self._agent.remove_remote_agent(name)
                raise TransferError(f"the metadata is of {name}, not of {peer}")
            self._peers.add(peer)

        await self._call(add)

    async def part(self, peer: str) -> None:
        """Forget an agent; its connections end. Never raises."""

        def remove() -> None:
            if peer in self._peers:
                self._peers.discard(peer)
                self._agent.remove_remote_agent(peer)

        try:
            await self._call(remove)
        except TransferError as error:
            log.debug("peer not removed", peer=peer, error=str(error))

    async def read(
        self,
        peer: str,
        here: Sequence[int],
        there: Sequence[int],
        size: int,
        until: float,
        late: Callable[[], None],
    ) -> None:
        """Read `size` bytes at each address `there` to the one `here`, in one transfer.

        When loop time is past `until`, `late` is called at once. Returns, or raises TransferError or
        TimeoutError, only when nothing is written here any more.
        """
        loop = asyncio.get_running_loop()

        def begin() -> tuple[Any, str]:
            descriptors = [
                self._agent.get_xfer_descs([(address, size, 0) for address in side], "DRAM")
                for side in (here, there)
            ]
            handle = self._agent.initialize_xfer("READ", *descriptors, peer)
            try:
                return handle, self._agent.transfer(handle)
            except Exception:
                handle.release()
                raise

        # A caller that is cancelled must not free what is being written.
        handle, state = await asyncio.shield(self._call(begin))
        try:
            while state == "PROC" and loop.time() < until:
                await asyncio.sleep(POLL_S)
                state = await self._call(self._agent.check_xfer_state, handle)
        finally:
            if state == "PROC":
                late()
            await asyncio.shield(self._finish(peer, handle, state))
        if state == "PROC":
            raise TimeoutError
        if state != "DONE":
            raise TransferError(f"the transfer ended in state {state}")

    async def close(self) -> None:
        """Let go of the arena. Idempotent."""

        def end() -> None:
            self._agent = None

        await self._call(end)
        self._thread.shutdown()

    async def _finish(self, peer: str, handle: Any, state: str) -> None:
        """Free a transfer; of one under way, end the connection first, and wait until it is over."""
        loop = asyncio.get_running_loop()
        told = loop.time() + LINGER_S
        while True:
            try:
                await self._call(handle.release)
                break
            except TransferError as error:
                # It cannot be cancelled while it runs.
                await self.part(peer)
                if loop.time() > told:
                    told = float("inf")
                    log.error("a read that was given up does not end; its slots stay taken", error=str(error))
            await asyncio.sleep(10 * POLL_S)
        if state == "PROC":
            # Cancelled is not ended: only without a connection does nothing come any more.
            await self.part(peer)

    def _open(self) -> None:
        if self._agent is not None:
            return
        from nixl import _api as nixl

        binding: Any = nixl.nixlBind  # pyright: ignore[reportAttributeAccessIssue]
        make_agent = binding.nixlAgent

        def rested(name: str, config: Any) -> Any:
            config.pthrDelay = PROGRESS_US
            return make_agent(name, config)

        binding.nixlAgent = rested
        try:
            agent: Any = nixl.nixl_agent(f"kvbm-{uuid.uuid4()}", nixl.nixl_agent_config(backends=["UCX"]))
        finally:
            binding.nixlAgent = make_agent
        address, size = self._store.arena
        agent.register_memory([(address, size, 0, "")], "DRAM")
        self._metadata = agent.get_agent_metadata()
        self._agent, self._name = agent, agent.name

    async def _call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Raises TransferError for whatever NIXL raises."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        except TransferError:
            raise
        except Exception as error:
            raise TransferError(f"{type(error).__name__}: {error}") from error
