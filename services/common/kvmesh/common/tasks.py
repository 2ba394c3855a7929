"""Ending background tasks."""

from __future__ import annotations

import asyncio

import structlog

log = structlog.get_logger()

# Seconds between attempts.
RETRY_S = 0.1


async def cancel(*tasks: asyncio.Task[None] | None) -> None:
    """Cancel tasks and return when all have ended; one that failed before is logged. None is skipped.

    Cancels again while a task lives on: `asyncio.wait_for` before Python 3.12 loses a cancellation that
    coincides with its result, and libraries are full of it.
    """
    pending = {task for task in tasks if task is not None}
    for task in pending:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task had failed", task=task.get_name(), exc_info=error)
    pending = {task for task in pending if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=RETRY_S)
