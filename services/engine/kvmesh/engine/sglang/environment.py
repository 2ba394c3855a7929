"""SGLang's settings that are environment variables.

It reads some of them as it is imported, so they are set before that; nothing here imports it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmesh.engine.sglang.spec import EngineSpec

# Makes kvmesh's plugins active; they stay out of the way of an SGLang that kvmesh did not start.
PLUGINS = "KVMESH_SGLANG_PLUGINS"
# Path of the unix socket the scheduler sends its outputs to.
OUTPUTS = "KVMESH_SGLANG_OUTPUTS"
# Path of the file a dying scheduler writes its reason to.
FAULT_FILE = "KVMESH_SGLANG_FAULT_FILE"


def set_environment(spec: EngineSpec) -> None:
    """For this process and those it starts. What the operator has set stays."""
    keep(defaults(spec.host, spec.engines))
    os.environ[PLUGINS] = "1"
    os.environ[OUTPUTS] = f"{spec.directory}/outputs"
    os.environ[FAULT_FILE] = f"{spec.directory}/fault"


def keep(names: Mapping[str, str]) -> None:
    """Set what is not set yet, for this process and those it starts."""
    for name, value in names.items():
        os.environ.setdefault(name, value)


def defaults(host: str, engines: int) -> dict[str, str]:
    """What holds for an engine on `host`, one of so many here, where nobody has set anything else."""
    names = {
        # The scheduler's socket speaks msgpack instead of pickle.
        "SGLANG_USE_PICKLE_IPC": "0",
        # Log probabilities are the model's, whatever the temperature.
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
        # A half whose other half never comes is held this long. Callers cancel long before; these end
        # what a caller that vanished left behind, and must outlast a prompt's queueing and prefill.
        "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "120",
        "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "120",
        # Decode looks whether prefill is alive this often, twice in vain before it gives up.
        "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2",
    }
    if host in ("127.0.0.1", "localhost", "::1"):
        # What listens for the other half listens where this worker does, not on every interface.
        names["SGLANG_HOST_IP"] = "127.0.0.1" if host == "localhost" else host
    import torch

    return names if torch.cuda.is_available() else {**names, **on_cpus(engines)}


def on_cpus(engines: int) -> dict[str, str]:
    """What holds for one of so many engines that share the processors; read as torch is imported."""
    cores = len(os.sched_getaffinity(0))
    return {
        # More threads than cores over all engines make each of them wait for the others.
        "OMP_NUM_THREADS": str(max(1, cores // max(1, engines))),
        # At the end of each of a step's many parallel regions threads wait for one another. One that spins
        # for long keeps a core from the one it waits for, where anything else runs on the machine; one that
        # does not spin has to be woken each time. (libgomp's own: 300,000.)
        "GOMP_SPINCOUNT": "4000",
    }
