"""`kvmesh down`: nothing of the mesh runs afterwards, whatever state it was in."""

from __future__ import annotations

import signal
import time

from rich.console import Console

from kvmesh.cli.display import Display
from kvmesh.cli.home import Home
from kvmesh.cli.pids import end, supervised, wait_gone
from kvmesh.common.config import Config

# On top of the longest drain: stages of a stop that wait for processes without one.
_MARGIN_S = 45.0


def down(config: Config, console: Console, *, now: bool = False) -> None:
    """Stop the mesh of `config.home`: drain it, or kill it at once with `now`. Idempotent; blocks.

    Ctrl-C while it drains kills what is left.
    """
    home = Home(config.home)
    stopped = _stop_supervisor(home, config, console, now=now)
    # The kernel ends children with their supervisor; these slipped through, or were the engines' own.
    strays = wait_gone(supervised(home.root), 1.0)
    if strays:
        console.print(f"ending {len(strays)} processes left behind")
        end(strays, 0.0 if now else 5.0)
    home.clear_status()
    console.print("stopped" if stopped or strays else f"nothing is running in {home.root}")


def _stop_supervisor(home: Home, config: Config, console: Console, *, now: bool) -> bool:
    """End whoever holds the home, and with it the processes it supervises; False when nobody does."""
    owner = home.owner()
    if owner is None:
        return False
    status = home.read_status()
    drain_s = config.frontend.drain_s + config.workers.drain_s + _MARGIN_S
    try:
        owner.send(signal.SIGTERM)
        if now:
            owner.send(signal.SIGTERM)
        with Display(console) as display:
            if status is not None:
                display.begin_from(status)
            deadline = time.monotonic() + (10.0 if now else drain_s)
            while owner.alive() and time.monotonic() < deadline:
                if (status := home.read_status()) is not None and status.supervisor == owner:
                    display.update(status)
                time.sleep(0.1)
    except KeyboardInterrupt:
        console.print("\nkilling")
    if owner.alive():
        owner.send(signal.SIGKILL)
        wait_gone([owner], 10.0)
    return True
