"""SGLang's settings that are environment variables.

It reads some of them as it is imported, so they are set before that; nothing here imports it.
"""

from __future__ import annotations

import os

import torch

from kvmesh.engine.sglang.spec import EngineSpec

# Makes kvmesh's plugins active; they stay out of the way of an SGLang that kvmesh did not start.
PLUGINS = "KVMESH_SGLANG_PLUGINS"
# Path of the unix socket the scheduler sends its outputs to.
OUTPUTS = "KVMESH_SGLANG_OUTPUTS"
# Path of the file a dying scheduler writes its reason to.
FAULT_FILE = "KVMESH_SGLANG_FAULT_FILE"


def set_environment(spec: EngineSpec) -> None:
    """For this process and those it starts. What the operator has set stays."""
    for name, value in defaults(spec.host, spec.engines).items():
        os.environ.setdefault(name, value)
    os.environ[PLUGINS] = "1"
    os.environ[OUTPUTS] = f"{spec.directory}/outputs"
    os.environ[FAULT_FILE] = f"{spec.directory}/fault"


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
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        # More threads than cores over all engines make each of them wait for the others.
        names["OMP_NUM_THREADS"] = str(max(1, cores // max(1, engines)))
    return names
