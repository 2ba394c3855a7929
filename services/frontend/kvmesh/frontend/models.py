"""The models served now: they appear, change and vanish with the workers that register them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import structlog

from kvmesh.common.capabilities import Names, met, needed, offered_together
from kvmesh.common.discovery.contract import Discovery
from kvmesh.common.errors import KvmeshError
from kvmesh.core import REASONING_FORMATS, TOOL_FORMATS
from kvmesh.frontend.tokenizer import Tokenizer, load_tokenizer
from kvmesh.v1.common_pb2 import (
    CAPABILITY_EMBED,
    CAPABILITY_GENERATE,
    ROLE_AGGREGATED,
    ROLE_DECODE,
    ROLE_PREFILL,
    WORKER_STATE_READY,
    Capability,
    KvInfo,
    ModelInfo,
    WorkerInfo,
)
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

# Registrations come with every heartbeat of every worker; looked at together.
_SETTLE_S = 0.02
_RETRY_LOAD_S = 5.0
_RETRY_AFTER_MS = 1_000


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked: ready workers for every stage, tokenizer loaded."""

    info: ModelInfo
    kv: KvInfo
    tokenizer: Tokenizer
    # Unix time at which this process first saw it.
    created: int
    # Changes with the model and how it is served: seeds hold as long as it does not.
    fingerprint: str
    # How it writes tool calls and marks reasoning; None: both are text.
    tool_format: str | None = None
    reasoning_format: str | None = None
    # What its workers can do for one request, in as many ways as they differ.
    offers: frozenset[Names] = frozenset()
    # The LoRA adapter that is meant; empty: the model as it is.
    adapter: str = ""

    @property
    def name(self) -> str:
        """What clients are told it is called."""
        return self.adapter or self.info.name

    @property
    def generates(self) -> bool:
        """Whether it goes on from prompts."""
        return self.can(CAPABILITY_GENERATE)

    @property
    def embeds(self) -> bool:
        """Whether it makes vectors of prompts."""
        return self.can(CAPABILITY_EMBED)

    def can(self, capability: Capability) -> bool:
        """Whether some of its workers have a capability."""
        return met(needed((capability,)), self.offers)


class Models:
    """Follows discovery. Belongs to one event loop."""

    def __init__(self, discovery: Discovery, aliases: Mapping[str, str] | None = None) -> None:
        """`aliases`: the gateway's own names for models, which are meant by name or their workers' alias."""
        self._discovery = discovery
        self._aliases = dict(aliases or {})
        self._registered: dict[str, ModelInfo] = {}
        self._usable: dict[str, Model] = {}
        # By model and adapter.
        self._adapted: dict[tuple[str, str], Model] = {}
        self._created: dict[str, int] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._failures: dict[str, tuple[KvmeshError, float]] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._callbacks: list[Callable[[], None]] = []

    def start(self) -> None:
        self._discovery.subscribe(self._settle)
        self._refresh()

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in self._loading.values():
            task.cancel()
        await asyncio.gather(*self._loading.values(), return_exceptions=True)

    @property
    def ready(self) -> bool:
        """Whether any model can be asked."""
        return bool(self._usable)

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `ready` may have changed."""
        self._callbacks.append(callback)

    def usable(self) -> list[Model]:
        """The models that can be asked, by name."""
        return [self._usable[name] for name in sorted(self._usable)]

    def adapters_of(self, model: Model) -> list[Model]:
        """The same with each adapter that some worker has loaded."""
        return [self._adapted[model.info.name, adapter] for adapter in model.info.adapters]

    def names_of(self, model: Model) -> tuple[str, ...]:
        """What clients may call it, its own name first."""
        names = (model.info.name, *model.info.aliases)
        names = (*names, *(alias for alias, meant in self._aliases.items() if meant in names))
        if model.adapter:
            return (model.adapter, *(f"{name}:{model.adapter}" for name in names))
        return names

    def resolve(self, name: str) -> Model:
        """The model a client means by a name or alias; empty means `default`.

        An adapter is meant by its name, or as `MODEL:ADAPTER`.

        Raises KvmeshError: MODEL_NOT_FOUND, or NO_WORKER_READY for a model without a full set of workers.
        """
        model = self._usable.get(name)
        if model is not None:
            return model
        wanted = name or "default"
        meant = self._meant(wanted)
        for info, adapter in meant:
            if info.name in self._usable:
                return self._adapted[info.name, adapter] if adapter else self._usable[info.name]
        if meant or not self._registered:
            raise self._not_ready(meant[0][0] if meant else None)
        known = ", ".join(sorted(self._registered))
        raise KvmeshError(
            ErrorCode.ERROR_CODE_MODEL_NOT_FOUND,
            f"the model {name or wanted!r} is not served here; served: {known}",
            param="model",
        )

    def _meant(self, wanted: str) -> list[tuple[ModelInfo, str]]:
        """The registered models that a name means, by their names; else those whose adapter it means."""
        known = [self._registered[name] for name in sorted(self._registered)]
        if named := self._named(known, wanted):
            return [(info, "") for info in named]
        model, colon, adapter = wanted.rpartition(":")
        bases = self._named(known, model) if colon else known
        adapter = adapter if colon else wanted
        return [(info, adapter) for info in bases if adapter in info.adapters]

    def _named(self, known: Iterable[ModelInfo], wanted: str) -> list[ModelInfo]:
        name = self._aliases.get(wanted, wanted)
        return [info for info in known if name == info.name or name in info.aliases]

    def _not_ready(self, info: ModelInfo | None) -> KvmeshError:
        what = f"model {info.name!r}" if info else "any model"
        why = f"no worker is ready for {what}; try again soon"
        if info and info.path in self._failures:
            why = self._failures[info.path][0].message
        elif info and info.path in self._loading:
            why = f"the tokenizer of {what} is being loaded; try again soon"
        return KvmeshError(ErrorCode.ERROR_CODE_NO_WORKER_READY, why, retry_after_ms=_RETRY_AFTER_MS)

    def _settle(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SETTLE_S, self._refresh)

    def _refresh(self) -> None:
        self._timer = None
        by_name: dict[str, list[WorkerInfo]] = {}
        for worker in self._discovery.workers().values():
            # A worker that is starting may not know its model yet.
            if worker.model.path:
                by_name.setdefault(worker.model.name, []).append(worker)
        self._registered = {name: _together(workers) for name, workers in by_name.items()}
        usable = {}
        for name, workers in by_name.items():
            path = workers[0].model.path
            self._want_tokenizer(path)
            if path in self._tokenizers and complete(workers):
                usable[name] = self._model(name, workers)
        for name in usable.keys() ^ self._usable.keys():
            log.info("model ready" if name in usable else "model not ready", model=name)
        if usable != self._usable:
            self._usable = usable
            self._adapted = {
                (name, adapter): replace(model, adapter=adapter)
                for name, model in usable.items()
                for adapter in model.info.adapters
            }
        for path in self._tokenizers.keys() - {info.path for info in self._registered.values()}:
            del self._tokenizers[path]
        for callback in self._callbacks:
            callback()

    def _model(self, name: str, workers: list[WorkerInfo]) -> Model:
        old, offers = self._usable.get(name), offered_together(workers)
        info, kv = self._registered[name], workers[0].kv
        tokenizer = self._tokenizers[info.path]
        if old and (old.info, old.kv, old.offers) == (info, kv, offers) and old.tokenizer is tokenizer:
            return old
        created = self._created.setdefault(name, int(time.time()))
        return Model(
            info,
            kv,
            tokenizer,
            created,
            _fingerprint(info, kv),
            _format(info.tool_format, tokenizer.text.tool_format, TOOL_FORMATS),
            _format(info.reasoning_format, tokenizer.text.reasoning_format, REASONING_FORMATS),
            offers,
        )

    def _want_tokenizer(self, path: str) -> None:
        if path in self._tokenizers or path in self._loading:
            return
        failed = self._failures.get(path)
        if failed is None or failed[1] <= time.monotonic():
            self._loading[path] = asyncio.create_task(self._load(path), name="load-tokenizer")

    async def _load(self, path: str) -> None:
        try:
            self._tokenizers[path] = await load_tokenizer(path)
            self._failures.pop(path, None)
        except KvmeshError as error:
            if path not in self._failures:
                log.error("tokenizer not loaded", path=path, error=error.message)
            self._failures[path] = (error, time.monotonic() + _RETRY_LOAD_S)
        finally:
            del self._loading[path]
        self._settle()


def _together(workers: list[WorkerInfo]) -> ModelInfo:
    """What all workers of a model say of it."""
    info, models = ModelInfo(), [worker.model for worker in workers]
    info.CopyFrom(models[0])
    # Whichever workers a request is given, both halves of it must fit.
    info.context_length = min(model.context_length for model in models)
    info.embedding_size = max(model.embedding_size for model in models)
    del info.adapters[:], info.capabilities[:]
    info.adapters.extend(sorted({name for model in models for name in model.adapters}))
    if all(model.capabilities for model in models):
        info.capabilities.extend(sorted({one for model in models for one in model.capabilities}))
    return info


def _format(wanted: str, shown: str | None, known: list[str]) -> str | None:
    """What workers say, or else what the template shows."""
    if wanted and wanted not in known:
        if wanted != "none":
            log.warning("format not known here, so what it marks is text", format=wanted)
        return None
    return wanted or shown


def _fingerprint(info: ModelInfo, kv: KvInfo) -> str:
    same = ModelInfo()
    same.CopyFrom(info)
    # What else its workers can do changes no answer.
    del same.adapters[:], same.capabilities[:]
    served = same.SerializeToString(deterministic=True) + kv.SerializeToString(deterministic=True)
    return f"fp_{hashlib.sha256(served).hexdigest()[:10]}"


def complete(workers: Iterable[WorkerInfo]) -> bool:
    """Whether the ready ones among these workers can answer a request together."""
    roles = {worker.role for worker in workers if worker.state == WORKER_STATE_READY}
    return ROLE_AGGREGATED in roles or {ROLE_PREFILL, ROLE_DECODE} <= roles
