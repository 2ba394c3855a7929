"""What both endpoints that generate take."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvmesh.common.errors import invalid
from kvmesh.frontend.protocol.body import Body
from kvmesh.frontend.protocol.constraints import ConstraintFields
from kvmesh.frontend.protocol.sampling import SamplingFields, StopFields
from kvmesh.v1.router_pb2 import ReturnHint

# Choices of one request: more are more requests.
MAX_CHOICES = 128
# A day: who comes later is like one who does not.
MAX_RETURN_S = 86_400
_SEEDS = 2**63
# What the tiers OpenAI sells are worth while requests wait; -10 to 10.
_TIERS = {"auto": 0, "default": 0, "flex": -5, "scale": 5, "priority": 5, "fast": 5, "ultrafast": 5}

ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
UserId = Annotated[str, Field(max_length=64)]


class StreamOptions(Body):
    include_usage: bool | None = None
    # Padding against observers of lengths; nothing is padded.
    include_obfuscation: bool | None = None


class KvmeshOptions(BaseModel):
    """The request's `kvmesh` object."""

    # Frozen: those who say nothing share one.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    explain: bool = False
    """answer with a `kvmesh` object: where the request ran and how long each part took"""
    policy: str = Field(default="", max_length=64)
    """the router's policy for this request"""
    session_id: str = Field(default="", max_length=256)
    """requests of one session are placed near each other by policies that know sessions"""
    tenant: str = Field(default="", max_length=256)
    """whose the request is; tenants share what capacity there is when requests wait"""
    priority: int | None = Field(default=None, ge=-10, le=10)
    """larger is more urgent, while requests wait; absent: as `service_tier` says"""
    returns: bool | None = None
    """whether a request that continues this one will come: stores keep what will be asked for again"""
    returns_in_s: float | None = Field(default=None, ge=0, le=MAX_RETURN_S)
    """when it will come, in seconds"""
    deadline_ms: int | None = Field(default=None, ge=1, le=3_600_000)
    """the first token is wanted within this time: of a tenant's requests that wait the soonest is next, and
    one that cannot be in time is refused"""


class GenerationRequest(SamplingFields, StopFields, ConstraintFields):
    model: str = Field(min_length=1)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    """choices to generate, each with the seed of the one before it plus 1"""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: ServiceTier | None = None
    session: str | None = Field(default=None, max_length=256)
    """another spelling of `kvmesh.session_id`"""
    prompt_cache_key: str | None = None
    user: str | None = None
    safety_identifier: UserId | None = None
    kvmesh: KvmeshOptions = KvmeshOptions()

    def wanted(self) -> int:
        """Choices of each prompt that are answered."""
        return self.n or 1

    def drawn(self) -> int:
        """Choices of each prompt that are generated, of which those are the best."""
        return self.wanted()

    def shows_scores(self) -> bool:
        """Whether log probabilities, where an engine gives them, are answered."""
        return True

    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def session_id(self) -> str:
        names = (self.session, self.prompt_cache_key, self.user, self.safety_identifier)
        return self.kvmesh.session_id or next(filter(None, names), "")

    def priority(self) -> int:
        if self.kvmesh.priority is not None:
            return self.kvmesh.priority
        return _TIERS[self.service_tier or "auto"]

    def return_hint(self) -> ReturnHint | None:
        """What is known of whether the conversation goes on; None: nothing."""
        said = self.kvmesh
        if said.returns is None and said.returns_in_s is None and not said.session_id:
            return None
        return ReturnHint(returns=said.returns, returns_in_s=said.returns_in_s)

    def tier(self) -> str:
        """The tier the request is served in, as answers name it."""
        return "default" if self.service_tier in (None, "auto") else self.service_tier

    def check(self) -> None:
        """Raise KvmeshError for fields that do not go together."""
        if self.min_tokens and self.constraint() is not None:
            raise invalid("min_tokens cannot be kept under a constraint; remove it", "min_tokens")
        if self.kvmesh.returns is False and self.kvmesh.returns_in_s is not None:
            raise invalid("kvmesh.returns_in_s is of requests that return; remove it", "kvmesh.returns_in_s")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed when stream is true", "stream_options")


def choice_seed(seed: int, choice: int) -> int:
    """The seed of a choice: n choices with a seed are n requests with this one, the next, and so on."""
    return (seed + choice) % _SEEDS
