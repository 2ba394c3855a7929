"""What holds for requests and can be changed while a router runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from kvmesh.common.config import RouterConfig
from kvmesh.common.errors import invalid
from kvmesh.router.policies import Policies
from kvmesh.v1.router_pb2 import ConfigureRequest, ConfigureResponse

# Waiting for longer than a day is waiting for ever.
_MOST_WAIT_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Always valid; a change makes another."""

    policy: str
    temperature: float
    # Requests of each model that wait at most, and for how long.
    max_waiting: int
    max_wait_s: float
    # Policies that look on.
    shadow: tuple[str, ...]

    @classmethod
    def of(cls, config: RouterConfig, policies: Policies) -> Settings:
        """Raises KvmeshError(INVALID_ARGUMENT) for an unknown policy."""
        return cls(
            config.policy, config.temperature, config.max_waiting, config.max_wait_s, tuple(config.shadow)
        )._checked(policies)

    def changed(self, request: ConfigureRequest, policies: Policies) -> Settings:
        """With what a request changes. Raises KvmeshError(INVALID_ARGUMENT)."""
        said: dict[str, Any] = {
            name: getattr(request, name)
            for name in ("policy", "temperature", "max_waiting", "max_wait_s")
            if request.HasField(name)
        }
        if request.HasField("shadow"):
            said["shadow"] = tuple(dict.fromkeys(request.shadow.names))
        return replace(self, **said)._checked(policies)

    def differences(self, old: Settings) -> dict[str, Any]:
        """What is not as it was, by name."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in named if value != getattr(old, name)}

    def to_proto(self) -> ConfigureResponse:
        return ConfigureResponse(
            policy=self.policy,
            temperature=self.temperature,
            max_waiting=self.max_waiting,
            max_wait_s=self.max_wait_s,
            shadow=self.shadow,
        )

    def _checked(self, policies: Policies) -> Settings:
        for name in (self.policy, *self.shadow):
            policies.check(name)
        if not 0 <= self.temperature < math.inf:
            raise invalid("the temperature is 0 or more", param="temperature")
        if not 0 < self.max_wait_s <= _MOST_WAIT_S:
            raise invalid("the longest wait is above 0 and at most a day, in seconds", param="max_wait_s")
        return self
