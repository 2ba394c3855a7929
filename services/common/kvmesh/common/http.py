"""The small HTTP side of every role: /metrics, /health (the process lives) and /ready (it serves)."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client.aiohttp import make_aiohttp_handler


class StatusServer:
    """Serves in the running event loop; no threads, no work while nobody asks."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        self._ready = ready
        application = web.Application()
        application.router.add_get("/metrics", make_aiohttp_handler())
        application.router.add_get("/health", self._answer_health)
        application.router.add_get("/ready", self._answer_ready)
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False)

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which was free if 0 was given. Raises OSError if it is taken."""
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        return self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _answer_health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _answer_ready(self, request: web.Request) -> web.Response:
        if self._ready():
            return web.json_response({"status": "ready"})
        return web.json_response({"status": "not ready"}, status=503)
