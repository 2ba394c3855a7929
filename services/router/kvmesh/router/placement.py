"""Which model a request means, and what is said when no worker can take it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from kvmesh.common.capabilities import Names, missing, offered, offered_together
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.v1.common_pb2 import Role, WorkerInfo, WorkerState
from kvmesh.v1.errors_pb2 import ErrorCode

# Advice to clients that find no worker: engines take seconds to start, and leave a mesh for seconds.
RETRY_AFTER_MS = 1000


def usable(info: WorkerInfo) -> bool:
    """Whether a worker takes requests now; a prefill worker needs an address to be fetched from."""
    ready = info.state == WorkerState.WORKER_STATE_READY and bool(info.model.name)
    return ready and (info.role != Role.ROLE_PREFILL or bool(info.bootstrap.port))


def model_names(workers: Iterable[WorkerInfo]) -> dict[str, str]:
    """Every name a request may give, and the model it means; an alias of several models means none."""
    names: dict[str, str] = {}
    several: set[str] = set()
    for info in workers:
        for alias in info.model.aliases if info.model.name else ():
            if names.setdefault(alias, info.model.name) != info.model.name:
                several.add(alias)
    for alias in several:
        del names[alias]
    return names | {info.model.name: info.model.name for info in workers if info.model.name}


def resolve(workers: Mapping[str, WorkerInfo], names: Mapping[str, str], model: str) -> str:
    """The model that `model` (name or alias; empty: the only one served) means; empty while none is known.

    `names` are `model_names` of the workers. Raises KvmeshError: MODEL_NOT_FOUND when workers serve other
    models only, INVALID_ARGUMENT when it must be named more exactly.
    """
    if model in names:
        return names[model]
    served = sorted(set(names.values()))
    if not model and len(served) > 1:
        raise invalid(f"several models are served, name one of: {', '.join(served)}", param="model")
    if not served or not model:
        # A worker that loads may not have said yet what it serves: only a mesh that is up can refuse a name.
        return served[0] if served else ""
    meant = sorted({info.model.name for info in workers.values() if model in info.model.aliases})
    if meant:
        raise invalid(f"several models are called `{model}`, name one of: {', '.join(meant)}", param="model")
    raise KvmeshError(
        ErrorCode.ERROR_CODE_MODEL_NOT_FOUND,
        f"model `{model}` is not served here; served: {', '.join(served)}",
        param="model",
    )


def none_ready(
    workers: Mapping[str, WorkerInfo], model: str, needs: Names, exclude: Collection[str] = ()
) -> KvmeshError:
    """NO_WORKER_READY for a model that no worker, or pair, can take now; with advice when to come back.

    UNSUPPORTED where all that there are could not, whenever it was.
    """
    serving = [info for info in workers.values() if info.model.name == model or not model]
    unsupported = missing(model, needs, offered_together(info for info in serving if info.model.name))
    if unsupported is not None:
        return unsupported
    able = [info for info in serving if needs <= offered(info.model)]
    roles = {info.role for info in able if usable(info) and info.id not in exclude}
    if {Role.ROLE_PREFILL, Role.ROLE_DECODE} <= roles:
        why = "no prefill worker is compatible with a decode worker (engine, model and page size must agree)"
    elif Role.ROLE_PREFILL in roles:
        why = "no decode worker is ready; retry shortly"
    elif Role.ROLE_DECODE in roles:
        why = "no prefill worker is ready; retry shortly"
    else:
        why = "no worker is ready; retry shortly" if serving else "no worker has joined yet; retry shortly"
    return KvmeshError(ErrorCode.ERROR_CODE_NO_WORKER_READY, why, retry_after_ms=RETRY_AFTER_MS)
