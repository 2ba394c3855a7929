"""Fixtures live by subject in `tests/fixtures`; all are registered here."""

import os
import signal

import pytest

# One machine runs many engines and servers at once during the tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that runs the suite in the background has it ignore Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["fixtures.mesh", "fixtures.nats", "fixtures.sglang_modules", "fixtures.kvbm", "fixtures.s3"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two lanes for `--dist loadgroup`. Real engines take a core and gigabytes each, so whatever starts them
    stays in one process, one after the other; all the rest, which mostly waits, goes file by file."""

    def engines(item: pytest.Item) -> bool:
        return item.get_closest_marker("sglang") is not None

    # The longest group first: it would else be waited for at the end.
    items.sort(key=lambda item: not engines(item))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("sglang" if engines(item) else str(item.path)))
