"""Fixtures live by subject in `tests/fixtures`; all are registered here."""

import os

# One machine runs many engines and servers at once during the tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["fixtures.mesh", "fixtures.nats", "fixtures.sglang_modules", "fixtures.kvbm"]
