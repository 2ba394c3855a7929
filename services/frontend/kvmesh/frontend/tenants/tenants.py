"""The gateway's side of tenants: from what a client sent to who it is, and to what its request is charged."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from functools import partial

import structlog

from kvmesh.common import metrics
from kvmesh.common.bus import Bus
from kvmesh.common.config import TenantsConfig
from kvmesh.common.errors import KvmeshError
from kvmesh.common.tasks import cancel
from kvmesh.frontend.tenants.account import Account
from kvmesh.frontend.tenants.charge import WHOLE, Charge, Share
from kvmesh.frontend.tenants.contract import ANYONE, Caller, wall_clock
from kvmesh.frontend.tenants.exchange import NatsExchange
from kvmesh.frontend.tenants.ledger import Amounts
from kvmesh.frontend.tenants.ring import KeyRing, read_file
from kvmesh.frontend.tenants.usage import UsageRecorder, Used
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

_TEND_S = 1.0
_DAY_S = 86_400


class Tenants:
    """One a process. Belongs to one event loop."""

    def __init__(
        self, config: TenantsConfig, bus: Bus, clock: Callable[[], float] = wall_clock, process: str = ""
    ) -> None:
        """`process` names this run among all frontends. Raises KvmeshError where `keys_file` is unusable."""
        self.config = config
        self.required = config.keys == "required"
        process = process or secrets.token_hex(6)
        fixed = read_file(config.keys_file) if config.keys_file and self.required else []
        self.ring = KeyRing(fixed, bus, config.keys_bucket, clock)
        self.usage = UsageRecorder(bus, config.usage_bucket, config.usage_days * _DAY_S, process, clock)
        self._clock = clock
        self._exchange = NatsExchange(bus, config.quotas_bucket, process, self._on_recall)
        self._accounts: dict[str, Account] = {}
        self._tending: asyncio.Task[None] | None = None
        self._returning: set[asyncio.Task[None]] = set()
        self._metrics = metrics.tenants()

    async def start(self) -> None:
        self.usage.start()
        if self.required:
            await self._exchange.start()
            await self.ring.start()
            self._tending = asyncio.create_task(self._tend(), name="quotas")

    async def close(self) -> None:
        """Give back all credit and write the last usage, if the bus is there."""
        tending, self._tending = self._tending, None
        await cancel(tending, *self._returning)
        await self.ring.close()
        if tending is not None:
            for account in self._accounts.values():
                await account.give_back()
        await self.usage.close()

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Who a request's lowercase headers or metadata say it is from.

        Raises KvmeshError: UNAUTHENTICATED, or UNAVAILABLE while the keys cannot be read.
        """
        if not self.required:
            return ANYONE
        scheme, _, text = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            text = ""
        text = text.strip() or headers.get("x-api-key", "").strip()
        if not text:
            self._refused("", "no_key")
            raise KvmeshError(
                ErrorCode.ERROR_CODE_UNAUTHENTICATED,
                "no API key was sent; send one as `Authorization: Bearer KEY` or `x-api-key: KEY`",
            )
        try:
            return Caller(self.ring.find(text))
        except KvmeshError as error:
            self._refused("", "keys_away" if error.retryable else "bad_key")
            raise

    def account(self, caller: Caller) -> Account | None:
        """What the caller's requests are charged to; None without limits."""
        key = caller.key
        if key is None or not any(key.limits):
            return None
        account = self._accounts.get(key.id)
        if account is None:
            account = self._accounts[key.id] = Account(key, self._exchange, self._clock)
        elif account.key is not key:
            account.change(key)
        return account

    async def take(self, account: Account, need: Amounts) -> None:
        """`Account.take`, counted."""
        try:
            await account.take(need)
        except KvmeshError as error:
            self._refused(account.key.tenant, ErrorCode.Name(error.code).removeprefix("ERROR_CODE_").lower())
            raise

    def check_model(self, caller: Caller, names: tuple[str, ...]) -> None:
        """Raise KvmeshError(PERMISSION_DENIED) unless the caller may ask for the model with these names."""
        if caller.key is not None and not caller.key.allows(names):
            self._refused(caller.tenant, "permission_denied")
            raise KvmeshError(
                ErrorCode.ERROR_CODE_PERMISSION_DENIED,
                f"key {caller.key.id} may not ask for model {names[0]!r}; "
                f"it may ask for {', '.join(caller.key.models)}",
                param="model",
            )

    def charge(
        self,
        caller: Caller,
        model: str,
        prompt_tokens: int,
        output_tokens: int,
        said: bool,
        share: Share = WHOLE,
    ) -> Charge:
        """What one answer will be charged; `output_tokens` are the most it may have, `said` by the client."""
        output = output_tokens if said else min(output_tokens, self.config.assumed_output_tokens)
        account = self.account(caller)

        def settle(unused: int, used: Used | None) -> None:
            if account is not None:
                account.give({"tokens": unused, "month": unused})
            if used is not None:
                self.usage.count(caller.tenant, model, used)

        take = partial(self.take, account) if account is not None else None
        return Charge(take, settle, share, prompt_tokens, output)

    def _refused(self, tenant: str, reason: str) -> None:
        self._metrics.refused.labels(tenant, reason).inc()

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(_TEND_S)
            for account in list(self._accounts.values()):
                await account.tend()

    def _on_recall(self, key_id: str) -> None:
        account = self._accounts.get(key_id)
        if account is None or not account.listed or account.busy:
            # Nothing lies idle here.
            self._exchange.returned(key_id)
        else:
            self._give_back(account)

    def _give_back(self, account: Account) -> None:
        async def run() -> None:
            await account.give_back()
            self._exchange.returned(account.key.id)

        task = asyncio.create_task(run(), name="give-back")
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)
