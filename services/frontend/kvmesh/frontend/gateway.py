"""What REST and gRPC share: the models, the way into the mesh, and how a request is made from its parts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from kvmesh.common.config import Config, FrontendConfig
from kvmesh.frontend.call import Call, bound_output, check_ids, check_prompt
from kvmesh.frontend.mesh import Mesh
from kvmesh.frontend.models import Model, Models
from kvmesh.v1.engine_pb2 import SamplingParams


class Gateway:
    """One a process."""

    def __init__(self, config: Config, models: Models, mesh: Mesh) -> None:
        self.config: FrontendConfig = config.frontend
        self.models = models
        self.mesh = mesh

    def call(
        self,
        request_id: str,
        model: Model,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        param: str,
        received: float | None = None,
        ids_from_client: bool = False,
        default_output: int | None = None,
        timeout_s: float | None = None,
        explain: bool = False,
        policy: str = "",
        session_id: str = "",
        tenant: str = "",
        priority: int = 0,
        params: Mapping[str, str] | None = None,
    ) -> Call:
        """A checked request. `param` names the prompt in the client's words; `sampling` is completed.

        `received` is the `time.monotonic` of receipt; `timeout_s`, from then on, may only shorten the
        configured one. Raises KvmeshError: INVALID_ARGUMENT or CONTEXT_LENGTH_EXCEEDED.
        """
        check_prompt(model, token_ids, param)
        if ids_from_client:
            check_ids(model, token_ids, param)
        check_ids(model, sampling.stop_token_ids, "stop_token_ids")
        check_ids(model, sampling.logit_bias, "logit_bias")
        bound_output(model, len(token_ids), sampling, default_output)
        received = time.monotonic() if received is None else received
        timeout = self.config.request_timeout_s
        return Call(
            request_id=request_id,
            model=model,
            token_ids=token_ids,
            sampling=sampling,
            deadline=received + (timeout if timeout_s is None else min(timeout, timeout_s)),
            received=received,
            explain=explain,
            policy=policy,
            session_id=session_id,
            tenant=tenant,
            priority=priority,
            params=params or {},
        )
