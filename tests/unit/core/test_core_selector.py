"""kvmesh.core.Selector as a Python object; what it decides is tested by its policies' conformance suite."""

from __future__ import annotations

import threading

from kvmesh.core import PrefixIndex, Selector


def test_it_may_be_used_and_dropped_on_any_thread() -> None:
    """A garbage collection runs on whichever thread it pleases."""
    selectors = [Selector(PrefixIndex(), block_tokens=16, seed=1)]
    seen: list[int] = []

    def use_and_drop() -> None:
        seen.append(selectors[0].leases)
        selectors.clear()

    thread = threading.Thread(target=use_and_drop)
    thread.start()
    thread.join()
    assert seen == [0]
