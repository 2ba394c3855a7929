"""What REST and gRPC share: the models, the way into the mesh, and how a request is made from its parts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import structlog

from kvmesh.common.block_names import cache_salt_of
from kvmesh.common.config import Config, FrontendConfig
from kvmesh.frontend.mesh.mesh import Mesh
from kvmesh.frontend.models import Model, Models
from kvmesh.frontend.responses.kept import Kept
from kvmesh.frontend.responses.runs import Runs
from kvmesh.frontend.serving.call import (
    Call,
    bound_output,
    check_ids,
    check_offered,
    check_prompt,
    check_prompt_ids,
    needs_of,
    packed,
)
from kvmesh.frontend.store.journal import Journal
from kvmesh.frontend.store.sqlite import SqliteStore
from kvmesh.frontend.stored_chats import StoredChats
from kvmesh.frontend.tenants.charge import WHOLE, Charge, Share
from kvmesh.frontend.tenants.contract import CALLER, Caller
from kvmesh.frontend.tenants.identity import priority_of, tenant_of
from kvmesh.frontend.tenants.tenants import Tenants
from kvmesh.v1.engine_pb2 import SamplingParams
from kvmesh.v1.router_pb2 import ReturnHint

log = structlog.get_logger()


class Gateway:
    """One a process."""

    def __init__(self, config: Config, models: Models, mesh: Mesh, tenants: Tenants | None = None) -> None:
        """`tenants` None: no keys are asked for, and no usage is kept."""
        self.config: FrontendConfig = config.frontend
        self.models = models
        self.mesh = mesh
        self.tenants = tenants
        self._share_cache = config.tenants.share_cache
        self._store = SqliteStore(config.frontend.store, config.home)
        self._journal = Journal(config.frontend.store, config.home)
        self.kept = Kept(self._store, self._journal)
        self.chats = StoredChats(self._store)
        self.runs = Runs(self._journal, self.kept)

    def owner(self) -> str:
        """Whose the current request's stored answers are: its key's tenant's, without keys nobody's."""
        return CALLER.get().tenant

    def model(self, name: str) -> Model:
        """The model a client means. Raises KvmeshError, also where its key does not open it."""
        model = self.models.resolve(name)
        self._check_model(CALLER.get(), model)
        return model

    async def close(self) -> None:
        """Return when no response is generated in the background and all that was stored is on its medium."""
        await self.runs.ended()
        await self._journal.close()
        await self._store.close()

    def cache_scope(self, tenant: str = "") -> str:
        """Begins the names of what the current request may share with others; `tenant` is its client's wish.

        Raises KvmeshError(PERMISSION_DENIED) for a tenant that is not its key's.
        """
        return "" if self._share_cache else cache_salt_of("", tenant_of(CALLER.get(), tenant))

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
        embeds: bool = False,
        timeout_s: float | None = None,
        explain: bool = False,
        policy: str = "",
        session_id: str = "",
        tenant: str = "",
        priority: int = 0,
        hint: ReturnHint | None = None,
        deadline_ms: int | None = None,
        params: Mapping[str, str] | None = None,
        share: Share = WHOLE,
    ) -> Call:
        """A checked request. `param` names the prompt in the client's words; `sampling` is completed.

        `received` is the `time.monotonic` of receipt; `timeout_s`, from then on, may only shorten the
        configured one; within `deadline_ms` the first token is wanted. `tenant` and `priority` are the
        client's wish; what its key says holds (`kvmesh.frontend.tenants.identity`). `share` is the part of
        its request that it pays for.

        Raises KvmeshError: INVALID_ARGUMENT, CONTEXT_LENGTH_EXCEEDED, UNSUPPORTED or PERMISSION_DENIED.
        """
        caller = CALLER.get()
        self._check_model(caller, model)
        tenant = tenant_of(caller, tenant)
        needs = needs_of(sampling, embeds=embeds)
        check_offered(model, needs, params or {})
        prompt = packed(model, token_ids, param)
        check_prompt(model, prompt, param, embeds=embeds)
        if ids_from_client:
            check_prompt_ids(model, prompt, param)
        check_ids(model, sampling.stop_token_ids, "stop_token_ids")
        check_ids(model, sampling.logit_bias, "logit_bias")
        said = sampling.HasField("max_new_tokens") or default_output is not None
        bound_output(model, len(token_ids), sampling, default_output)
        if self.config.log_prompts and share.prompt:
            text = model.tokenizer.text.decode(prompt, False)
            log.info("prompt", request_id=request_id, model=model.name, text=text)
        received = time.monotonic() if received is None else received
        timeout = self.config.request_timeout_s
        return Call(
            request_id=request_id,
            model=model,
            token_ids=prompt,
            sampling=sampling,
            deadline=received + (timeout if timeout_s is None else min(timeout, timeout_s)),
            received=received,
            explain=explain,
            policy=policy,
            session_id=session_id,
            tenant=tenant,
            priority=priority_of(caller, priority),
            hint=hint,
            first_by=received + deadline_ms / 1000 if deadline_ms is not None else None,
            needs=needs,
            cache_salt=cache_salt_of(model.info.cache_salt, "" if self._share_cache else tenant),
            charge=self._charge(caller, model, len(token_ids), sampling.max_new_tokens, said, share),
            params=params or {},
        )

    def _check_model(self, caller: Caller, model: Model) -> None:
        # Without a key it is anybody's.
        if self.tenants is not None and caller.key is not None:
            self.tenants.check_model(caller, self.models.names_of(model))

    def _charge(
        self, caller: Caller, model: Model, prompt_tokens: int, output_tokens: int, said: bool, share: Share
    ) -> Charge | None:
        """`said`: by the client, how much output it wants at most."""
        if self.tenants is None:
            return None
        return self.tenants.charge(caller, model.info.name, prompt_tokens, output_tokens, said, share)
