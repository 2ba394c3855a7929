"""What one answer costs its tenant: reserved before it is placed, settled by what it used."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from kvmesh.frontend.tenants.ledger import Amounts
from kvmesh.frontend.tenants.usage import Used
from kvmesh.v1.common_pb2 import CachedTokens


class Share(NamedTuple):
    """What of its request an answer pays for: further choices of a prompt pay for their output alone."""

    request: bool
    prompt: bool


WHOLE = Share(request=True, prompt=True)


class Charge:
    __slots__ = ("_prompt_tokens", "_reserved", "_settle", "_share", "_take", "_wanted")

    def __init__(
        self,
        take: Callable[[Amounts], Awaitable[None]] | None,
        settle: Callable[[int, Used | None], None],
        share: Share,
        prompt_tokens: int,
        output_tokens: int,
    ) -> None:
        """`take` charges or raises; None: nothing is limited.

        `settle` gets what is left of that, negative where more was used, and usage, None of an answer that
        never had any.
        """
        self._take = take
        self._settle = settle
        self._share = share
        self._prompt_tokens = prompt_tokens if share.prompt else 0
        self._wanted = self._prompt_tokens + output_tokens
        self._reserved = 0

    async def reserve(self) -> None:
        """Raises KvmeshError: RATE_LIMITED or QUOTA_EXHAUSTED; then nothing is charged."""
        if self._take is not None:
            await self._take({"tokens": self._wanted, "month": self._wanted})
            self._reserved = self._wanted

    def settle(
        self, *, started: bool, output_tokens: int, cached: CachedTokens, reasoning_tokens: int = 0
    ) -> None:
        """The answer is over, with so many tokens; one that never had any costs nothing. Call it once."""
        if not started:
            self._settle(self._reserved, None)
            return
        used = Used(int(self._share.request), self._prompt_tokens, output_tokens=output_tokens)
        used.reasoning_tokens = reasoning_tokens
        self._add_cached(used, cached)
        self._settle(self._reserved - used.prompt_tokens - used.output_tokens, used)

    def _add_cached(self, used: Used, cached: CachedTokens) -> None:
        """Of the part of the prompt that this answer pays for."""
        left = self._prompt_tokens
        for tier, found in cached.ListFields():
            tokens = min(found, left)
            left -= tokens
            used.cached_tokens += tokens
            setattr(used, f"cached_{tier.name}_tokens", tokens)
