"""LMCache's and Mooncake's stores, ready to work beside ours; none where they cannot be installed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import httpx
from tier.rounds import PeerStore

import harness  # noqa: F401 - makes the tests' fixtures importable
from fixtures.ports import free_port
from harness import say
from peers import LMCACHE, MOONCAKE, lmcache_environment, mooncake_environment

# Ends the name of a peer that verifies what it gives back.
CHECKED = "with its checksum"
Stores = dict[str, PeerStore]


def of_memory(cleanup: ExitStack, size: int, items: int, folder: Path) -> Stores:
    stores: Stores = {}
    if _lmcache():
        stores[f"LMCache {LMCACHE}"] = _start_lmcache(cleanup, "memory", size, items, folder)
    if _mooncake():
        master = cleanup.enter_context(_master(folder))
        for name, checks in ((f"Mooncake {MOONCAKE}", "0"), (f"Mooncake {MOONCAKE} {CHECKED}", "1")):
            stores[name] = _start_mooncake(cleanup, master, size, items, "own", folder, checks)
    return stores


def of_disk(cleanup: ExitStack, size: int, items: int, folder: Path) -> Stores:
    if not _lmcache():
        return {}
    return {
        f"LMCache {LMCACHE}{name}": _start_lmcache(cleanup, kind, size, items, folder)
        for kind, name in (("disk", ""), ("native", " C++"))
    }


def of_network(cleanup: ExitStack, size: int, items: int, folder: Path) -> Stores:
    if not _mooncake():
        return {}
    master = cleanup.enter_context(_master(folder))
    _start_mooncake(cleanup, master, size, items, "hold", folder)
    ours = _start_mooncake(cleanup, master, size, items, "elsewhere", folder)
    return {f"Mooncake {MOONCAKE}": ours}


def _start_lmcache(cleanup: ExitStack, kind: str, size: int, items: int, folder: Path) -> PeerStore:
    place = [] if kind == "memory" else [folder / f"lmcache-{kind}"]
    log = folder / f"lmcache-{kind}.log"
    store = PeerStore(lmcache_environment(), "tier.lmcache_store", kind, size, items, *place, log=log)
    return cleanup.enter_context(store)


def _start_mooncake(
    cleanup: ExitStack, master: str, size: int, items: int, segment: str, folder: Path, checks: str = "0"
) -> PeerStore:
    python, needs = mooncake_environment()
    needs |= {"MOONCAKE_STORE_CHECKSUM": checks}
    log = folder / f"mooncake-{segment}-{checks}.log"
    arguments = (master, size, items, segment)
    return cleanup.enter_context(PeerStore(python, "tier.mooncake_store", *arguments, log=log, needs=needs))


@contextmanager
def _master(folder: Path) -> Iterator[str]:
    """Mooncake's master; its host:port."""
    python, needs = mooncake_environment()
    port, metrics = free_port(), free_port()
    command = [python.with_name("mooncake_master"), f"-rpc_port={port}", f"-metrics_port={metrics}"]
    with (folder / "mooncake-master.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=needs)
    try:
        _wait(f"http://127.0.0.1:{metrics}/health", process)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(url, timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise RuntimeError("Mooncake's master does not start")


@cache
def _lmcache() -> bool:
    try:
        lmcache_environment()
    except RuntimeError as error:
        say(f"without LMCache: {error}")
        return False
    return True


@cache
def _mooncake() -> bool:
    try:
        mooncake_environment()
    except RuntimeError as error:
        say(f"without Mooncake: {error}")
        return False
    return True
