"""What workers can do, what a request needs, and what is said where the two do not meet.

Both are names: a capability's as people write it, e.g. `constrain`, and `adapter:NAME` of a LoRA adapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from kvmesh.common.errors import KvmeshError
from kvmesh.v1.common_pb2 import (
    CAPABILITY_CONSTRAIN,
    CAPABILITY_GENERATE,
    CAPABILITY_LOGPROBS,
    ROLE_AGGREGATED,
    ROLE_DECODE,
    ROLE_PREFILL,
    Capability,
    ModelInfo,
    WorkerInfo,
)
from kvmesh.v1.errors_pb2 import ErrorCode

# What a request needs, and what a worker can do.
Names = frozenset[str]

# Of a worker that does not say.
_UNSAID = (CAPABILITY_GENERATE, CAPABILITY_CONSTRAIN, CAPABILITY_LOGPROBS)
_ADAPTER = "adapter:"


# Asked for every request.
@lru_cache(256)
def capability_name(capability: Capability) -> str:
    """As people write it; one of a later version has its number for a name."""
    if capability not in Capability.values():
        return str(int(capability))
    return Capability.Name(capability).removeprefix("CAPABILITY_").lower()


def needed(capabilities: Iterable[Capability], adapter: str = "") -> Names:
    """What its workers must be able to do for a request."""
    return _names(tuple(capabilities), adapter)


# So is this, and requests need one of a few things.
@lru_cache(1024)
def _names(capabilities: tuple[Capability, ...], adapter: str) -> Names:
    names = {capability_name(one) for one in capabilities}
    return frozenset(names | {_ADAPTER + adapter} if adapter else names)


def offered(model: ModelInfo) -> Names:
    """What a worker that registered `model` can do."""
    return needed(model.capabilities or _UNSAID).union(_ADAPTER + name for name in model.adapters)


def offered_together(workers: Iterable[WorkerInfo]) -> frozenset[Names]:
    """What the workers of one model can do for one request: each aggregated one, and each pair of halves."""
    of_role: dict[int, set[Names]] = {}
    for info in workers:
        of_role.setdefault(info.role, set()).add(offered(info.model))
    pairs = ((a, b) for a in of_role.get(ROLE_PREFILL, ()) for b in of_role.get(ROLE_DECODE, ()))
    return frozenset(of_role.get(ROLE_AGGREGATED, set()).union(a & b for a, b in pairs))


# Few models are asked for few things, again and again.
@lru_cache(1024)
def met(needs: Names, offers: frozenset[Names]) -> bool:
    """Whether some of the workers that make `offers` have all `needs`."""
    return any(needs <= offer for offer in offers)


def missing(model: str, needs: Names, offers: Iterable[Names]) -> KvmeshError | None:
    """UNSUPPORTED, naming what no worker of `model` has; None where some offer all `needs`, or none is known.

    `offers` are `offered_together` of its workers, whatever these do now.
    """
    offers = frozenset(offers)
    if not offers or met(needs, offers):
        return None
    nowhere = needs.difference(*offers)
    what = " and ".join(_said(name) for name in sorted(nowhere or needs))
    return KvmeshError(
        ErrorCode.ERROR_CODE_UNSUPPORTED,
        f"no worker of model `{model}` has {what}{'' if nowhere else ' together'}; "
        "leave out what needs that, or ask another model",
    )


def _said(name: str) -> str:
    if name.startswith(_ADAPTER):
        return f"the adapter `{name.removeprefix(_ADAPTER)}`"
    return f"the capability `{name}`"
