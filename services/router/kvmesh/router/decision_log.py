"""The decision logs of a router's models: where they are written, and what became of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import structlog

from kvmesh.common.config import DecisionLogConfig
from kvmesh.common.errors import invalid
from kvmesh.common.metrics import RouterMetrics
from kvmesh.core import Selector
from kvmesh.router.model import Model

log = structlog.get_logger()


class DecisionLogs:
    """One a model, in one directory; none where no path is configured. `run` names this router's life."""

    def __init__(self, config: DecisionLogConfig, run: str, metrics: RouterMetrics) -> None:
        """Makes the directory. Raises KvmeshError(INVALID_ARGUMENT) when it cannot be written."""
        self._config = config
        self._run = run
        self._metrics = metrics
        self._epoch = time.time()
        if not config.path:
            return
        try:
            os.makedirs(config.path, exist_ok=True)
        except OSError as error:
            raise invalid(f"router.decision_log.path: cannot make {config.path}: {error.strerror}") from None
        if not os.access(config.path, os.W_OK | os.X_OK):
            raise invalid(f"router.decision_log.path: {config.path} cannot be written")

    def open(self, name: str, selector: Selector) -> None:
        """Begin a model's. Where that fails the router says so and goes on: requests come first."""
        config = self._config
        if not config.path:
            return
        try:
            selector.open_log(
                config.path,
                model=name,
                run=self._run,
                epoch=self._epoch,
                max_bytes=config.max_bytes,
                max_files=config.max_files,
            )
        except OSError as error:
            log.error("no decision log is written", model=name, path=config.path, error=str(error))

    def count(self, models: Iterable[Model]) -> None:
        """What was written and lost since the last time."""
        if not self._config.path:
            return
        failing = 0
        for model in models:
            lines, dropped, problem = model.logged()
            self._metrics.log_lines.inc(lines)
            self._metrics.log_dropped.inc(dropped)
            failing += problem is not None
            if dropped:
                log.warning("decision log is missing lines", model=model.name, lines=dropped, error=problem)
        self._metrics.log_failing.set(failing)
