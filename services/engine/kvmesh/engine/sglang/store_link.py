"""An engine's connections to the node's store, kept up in the background.

Two connections: one for the scheduler's short questions and for loads, one for offloads, so that no question
waits behind a copy. Nothing here raises because the store is absent, slow or dead.
"""

from __future__ import annotations

import logging
import secrets
import threading

from kvmesh.core import Lease, StoreClient
from kvmesh.engine.sglang.device_pages import DevicePages
from kvmesh.engine.sglang.namespace import StoreNamespace

log = logging.getLogger(__name__)

# The scheduler waits this long for an answer, once: then the connection is given up and made anew.
ASK_TIMEOUT_S = 0.05
OFFLOAD_TIMEOUT_S = 2.0
# How often the store is looked for, or looked after.
CHECK_S = 0.5
# A process has one number, whatever connects from it.
_ENGINE = secrets.randbits(63)


class StoreLink:
    """Methods may be called from any thread; `lookup` and `lease` take `ASK_TIMEOUT_S` at most."""

    def __init__(self, socket: str, namespace: StoreNamespace, segments: list[int]) -> None:
        def client(timeout_s: float) -> StoreClient:
            return StoreClient(
                socket, **namespace._asdict(), segments=segments, engine=_ENGINE, timeout_s=timeout_s
            )

        self._socket = socket
        self._ask = client(ASK_TIMEOUT_S)
        self._copy = client(OFFLOAD_TIMEOUT_S)
        self._closing = threading.Event()
        # Set when a connection was given up.
        self._lost = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="kvbm-link", daemon=True)
        self._watcher.start()

    def lookup(self, digests: bytes, per_block_s: float) -> tuple[int, bool]:
        """Leading blocks the store has, and whether more are being brought from elsewhere.

        They are where that takes less than computing them, at `per_block_s` each. (0, False) without a store.
        """
        try:
            return self._ask.lookup_for(digests, per_block_s)
        except ConnectionError:
            self._lost.set()
            return 0, False

    def lease(self, digests: bytes) -> Lease | None:
        """All the blocks, kept for loading, or None."""
        try:
            return self._ask.lease(digests)
        except ConnectionError:
            self._lost.set()
            return None

    def offload(
        self, pages: DevicePages, tenant: str, parent: bytes | None, digests: bytes, ids: list[int]
    ) -> bool:
        """Whether the store has all these pages of a tenant now; empty: nobody's."""
        try:
            return pages.offload(self._copy, parent, digests, ids, tenant)
        except ConnectionError:
            self._lost.set()
            return False

    def close(self) -> None:
        self._closing.set()
        self._lost.set()
        self._watcher.join()
        self._ask.close()
        self._copy.close()

    def _watch(self) -> None:
        reported = ""
        while True:
            problem = self._connect()
            if problem != reported:
                if problem:
                    log.warning("running without the KV store until it is there: %s", problem)
                else:
                    log.warning("connected to the KV store at %s", self._socket)
                reported = problem
            # One that was only slow is there again at once; one that is gone is not asked at every look-up.
            (self._closing if problem else self._lost).wait(CHECK_S)
            self._lost.clear()
            if self._closing.is_set():
                return

    def _connect(self) -> str:
        """Make the connections there should be; says what hinders."""
        try:
            for client in (self._ask, self._copy):
                if not client.connected:
                    client.connect()
        except (ConnectionError, OSError, ValueError) as error:
            # ValueError: the store cannot hold such blocks. Another one may, later.
            return str(error)
        return ""
