"""Fixtures live by subject in `tests/fixtures`; all are registered here."""

import os
import signal

# One machine runs many engines and servers at once during the tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that runs the suite in the background has it ignore Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One that another imports comes before it.
pytest_plugins = [
    "fixtures.forkserver",
    "fixtures.shared_meshes",
    "fixtures.lanes",
    "fixtures.nats",
    "fixtures.sglang_modules",
    "fixtures.kvbm",
    "fixtures.s3",
]
