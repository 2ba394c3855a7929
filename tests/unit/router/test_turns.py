"""When a router looks about."""

from __future__ import annotations

import time

import uvloop

from kvmesh.router.turns import Turns


def test_what_is_due_now_is_no_trouble_for_the_loop_of_processes() -> None:
    """uvloop gives a handle without a time for what is to be called at once."""

    async def main() -> None:
        turns = Turns(time.monotonic, lambda: None, lambda now: [now])
        turns.start()
        turns.arm()
        turns.close()

    uvloop.run(main())
