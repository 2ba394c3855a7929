"""The gate in front of the API: who is it, may another request in, and what the answer says of limits."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvmesh.common.errors import KvmeshError
from kvmesh.frontend.serving.failures import failure
from kvmesh.frontend.tenants.account import Account
from kvmesh.frontend.tenants.contract import CALLER, Caller
from kvmesh.frontend.tenants.ledger import Amounts, Dimension
from kvmesh.frontend.tenants.tenants import Tenants

# Posts that cost no engine anything.
_FREE = frozenset(
    ("/v1/tokenize", "/v1/detokenize", "/v1/messages/count_tokens", "/v1/responses/input_tokens")
)
_ONE: Amounts = {"requests": 1, "concurrency": 1}


@asynccontextmanager
async def admitted(tenants: Tenants, caller: Caller) -> AsyncIterator[Account | None]:
    """One more request of the caller, from here until the block ends.

    Raises KvmeshError(RATE_LIMITED) before the block.
    """
    account = tenants.account(caller)
    if account is None:
        yield None
        return
    await tenants.take(account, _ONE)
    try:
        yield account
    finally:
        account.give({"concurrency": 1})


class Gate:
    """ASGI, inside what gives a request its id: stops requests under /v1/ without a key that opens."""

    def __init__(self, app: ASGIApp, tenants: Tenants) -> None:
        self._app = app
        self._tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        account: Account | None = None

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start" and account is not None:
                message["headers"] = [*message["headers"], *limit_headers(account)]
            await send(message)

        try:
            headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
            caller = self._tenants.caller(headers)
            CALLER.set(caller)
            if scope["method"] != "POST" or scope["path"] in _FREE:
                await self._app(scope, receive, send)
                return
            account = self._tenants.account(caller)
            async with admitted(self._tenants, caller):
                await self._app(scope, receive, send_with_limits)
        except KvmeshError as error:
            # The application answers its own; this one is the gate's.
            await failure(scope, error)(scope, receive, send_with_limits)


def limit_headers(account: Account) -> list[tuple[bytes, bytes]]:
    """OpenAI's `x-ratelimit-*` for the limits the key has."""
    limits = account.key.limits
    headers: list[tuple[bytes, bytes]] = []
    rates: tuple[tuple[Dimension, int], ...] = (("requests", limits.requests), ("tokens", limits.tokens))
    for dimension, limit in rates:
        if limit:
            left = account.left(dimension)
            values = {"limit": limit, "remaining": int(left), "reset": duration((limit - left) * 60 / limit)}
            headers += [
                (f"x-ratelimit-{what}-{dimension}".encode(), str(value).encode())
                for what, value in values.items()
            ]
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes one: 0s, 120ms, 1s, 6m0s, 1h0m0s."""
    ms = math.ceil(max(0.0, seconds) * 1000)
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{ms / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
