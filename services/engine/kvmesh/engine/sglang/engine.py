"""The Engine contract on SGLang's schedulers, driven by SGLang's own wire.

One receiver decodes the scheduler's message of a step and calls each sink once with all its outputs;
a request costs no task, no future and no queue.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import zmq

from kvmesh.common.config import Config
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.engine.adapters import check_adapter
from kvmesh.engine.contract import (
    Bootstrap,
    CachedTokens,
    Engine,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    Finish,
    KvEvent,
    Probe,
    Role,
    Sampling,
    StepOutput,
    StepSink,
    Timing,
)
from kvmesh.engine.probing import Probing
from kvmesh.engine.sglang.events import KvEventStream
from kvmesh.engine.sglang.finishes import CANCELLED, aborted, failed, finish_of
from kvmesh.engine.sglang.frames import FrameReader
from kvmesh.engine.sglang.load import LoadReader
from kvmesh.engine.sglang.process import EngineProcess
from kvmesh.engine.sglang.rehearsals import CACHED, NO_PEER, NOT_CACHED
from kvmesh.engine.sglang.sampling import logprob_fields, sampling_fields
from kvmesh.engine.sglang.spec import EngineSpec
from kvmesh.engine.sglang.wire import Wire
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger(__name__)

# A scheduler answers an abort with the request's last output, or, where the request slipped between
# two of its queues, not at all: then it is told again, and in the end the request counts as gone.
_ABORT_AGAIN_S = 1.0
_ABORT_TIMES = 10
_FLUSH_S = 30.0
# Unix socket paths end here; SGLang's own take some 30 characters of it.
_LONGEST_DIRECTORY = 70


@dataclass(slots=True)
class _Live:
    """A request the scheduler knows."""

    handle: int
    sink: StepSink
    prompt_tokens: int
    started: bool = False
    aborts: int = 0
    again: asyncio.TimerHandle | None = None


class SglangEngine(Engine):
    """SGLang in child processes of this one. Nothing of them outlives it, however it ends."""

    def __init__(
        self,
        config: Config,
        role: Role,
        *,
        model_path: str,
        worker_id: str,
        bootstrap_host: str = "127.0.0.1",
        kvbm_socket: str | None = None,
    ) -> None:
        self._config, self._role = config, role
        self._model_path, self._worker_id = model_path, worker_id
        self._bootstrap_host, self._kvbm_socket = bootstrap_host, kvbm_socket
        self._handles = itertools.count(1)
        self._live: dict[str, _Live] = {}
        self._flushes: list[asyncio.Future[Any]] = []
        self._totals = EngineLoad()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._outputs: asyncio.Server | None = None
        self._process: EngineProcess | None = None
        self._load_reader: LoadReader | None = None
        self._load_file = ""
        self._directory = ""
        self._ended: KvmeshError | None = None

    async def start(self) -> EngineInfo:
        try:
            return await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> EngineInfo:
        self._loop = asyncio.get_running_loop()
        self._directory = _make_directory()
        spec = EngineSpec.of(
            self._config, self._role, self._model_path, self._worker_id, self._directory, self._kvbm_socket
        )
        self._outputs = await self._loop.create_unix_server(
            lambda: FrameReader(self._on_message), path=f"{self._directory}/outputs"
        )
        self._process = EngineProcess(spec)
        await self._process.start()
        ports = await self._process.event("ports")
        self._load_file = ports["load"]
        self._context = zmq.Context()
        self._inputs = self._context.socket(zmq.PUSH)
        self._events = KvEventStream(self._context, self._directory)
        self._inputs.setsockopt(zmq.SNDHWM, 0)
        self._inputs.bind(ports["inputs"])
        ready = await self._process.event("ready")
        self._wire = Wire(ready["layout"])
        self._load_reader = LoadReader(self._load_file)
        await self._process.unless_failed(self._events.catch_up())
        described = ready["info"]
        self._max_prompt: int = described.pop("max_prompt")
        self._priorities: bool = described.pop("priorities")
        # By name: what SGLang calls it.
        self._adapters: dict[str, str] = described.pop("adapters")
        self._info = EngineInfo(
            role=self._role,
            bootstrap_host=self._bootstrap_host if self._role is Role.PREFILL else "",
            adapters=tuple(sorted(self._adapters)),
            **(described | {"eos_token_ids": tuple(described["eos_token_ids"])}),
        )
        self._process.failure.add_done_callback(lambda failure: self._end(failure.result()))
        return self._info

    def submit(self, request: EngineRequest, sink: StepSink) -> int:
        if self._ended is not None:
            raise self._ended
        token_ids = self._checked_prompt(request)
        bootstrap = self._checked_bootstrap(request)
        if self._info.embedding_size:
            return self._embed(token_ids, request.priority, sink)
        room = self._info.context_length - len(token_ids)
        sampling = sampling_fields(request.sampling, self._role, self._info.vocab_size, room)
        if request.sampling.constraint is not None and not self._info.constraints:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_UNSUPPORTED,
                "the model's tokenizer cannot be constrained; ask for free text",
                param="constraint",
            )
        check_adapter(request.adapter, self._info)
        if salt := request.block_salt:
            bootstrap["cache_salt"] = salt
        if request.adapter:
            bootstrap["lora_id"] = self._adapters[request.adapter]
        if self._priorities:
            bootstrap["priority"] = request.priority
        return self._queue(
            token_ids, sampling, sink, **bootstrap, **logprob_fields(request.sampling, self._role)
        )

    def _queue(self, token_ids: array[int], sampling: dict[str, Any], sink: StepSink, **fields: Any) -> int:
        handle = next(self._handles)
        # Of one length, because SGLang takes an abort for all ids that begin with the one named.
        rid = f"{handle:016x}"
        message = self._wire.request(rid, token_ids, sampling, **fields)
        self._live[rid] = _Live(handle, sink, len(token_ids))
        self._inputs.send(message, zmq.NOBLOCK)
        return handle

    def _embed(self, token_ids: array[int], priority: int, sink: StepSink) -> int:
        handle = next(self._handles)
        rid = f"{handle:016x}"
        urgency = {"priority": priority} if self._priorities else {}
        self._live[rid] = _Live(handle, sink, len(token_ids))
        self._inputs.send(self._wire.embedding(rid, token_ids, **urgency), zmq.NOBLOCK)
        return handle

    def _checked_prompt(self, request: EngineRequest) -> array[int]:
        try:
            token_ids = array("q", request.token_ids)
        except (TypeError, OverflowError):
            raise invalid("the prompt must be token ids", "token_ids") from None
        if not token_ids:
            raise invalid("the prompt is empty", "token_ids")
        # The scheduler dies of an id outside the vocabulary.
        if min(token_ids) < 0 or max(token_ids) >= self._info.vocab_size:
            raise invalid(f"token ids must be at least 0 and below {self._info.vocab_size}", "token_ids")
        if len(token_ids) > self._max_prompt:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {len(token_ids)} tokens, but the engine takes at most {self._max_prompt}",
                param="token_ids",
            )
        return token_ids

    def _checked_bootstrap(self, request: EngineRequest) -> dict[str, Any]:
        meeting = request.bootstrap
        if (meeting is None) != (self._role is Role.AGGREGATED):
            wants = "takes no" if meeting is not None else "needs a"
            raise KvmeshError(
                ErrorCode.ERROR_CODE_WRONG_ROLE,
                f"engine {self._worker_id} is {self._role.value} and {wants} bootstrap",
            )
        return {} if meeting is None else _bootstrap_fields(meeting)

    def abort(self, handle: int) -> None:
        rid = f"{handle:016x}"
        live = self._live.get(rid)
        if live is not None and live.aborts == 0:
            self._send_abort(rid, live)

    def _send_abort(self, rid: str, live: _Live) -> None:
        if live.aborts >= _ABORT_TIMES:
            log.error("the scheduler did not answer an abort", worker=self._worker_id, request=rid)
            self._finish(rid, live, CANCELLED)
            return
        live.aborts += 1
        self._inputs.send(self._wire.abort(rid), zmq.NOBLOCK)
        live.again = self._loop.call_later(_ABORT_AGAIN_S, self._send_abort, rid, live)

    def _on_message(self, data: memoryview) -> None:
        message = self._wire.decode(data)
        match type(message).__name__:
            case "BatchTokenIDOutput":
                self._on_outputs(message)
            case "BatchEmbeddingOutput":
                self._on_embeddings(message)
            case "AbortReq":
                if (live := self._live.get(message.rid)) is not None:
                    self._finish(message.rid, live, aborted(message.finished_reason, live.aborts > 0))
            case "FlushCacheReqOutput":
                if self._flushes and not (flush := self._flushes.pop(0)).done():
                    flush.set_result(message)

    def _on_outputs(self, message: Any) -> None:
        by_sink: dict[StepSink, list[StepOutput]] = {}
        times = None
        logprobs = self._wire.logprobs(message)
        for place, rid in enumerate(message.rids):
            live = self._live.get(rid)
            if live is None:  # a second last output, or one after we gave an abort up
                continue
            reason = message.finished_reasons[place]
            token_ids = self._wire.token_ids(message.output_ids[place])
            output = StepOutput(live.handle, token_ids)
            if logprobs is not None:
                output.logprobs = logprobs.output(place)
                output.prompt_logprobs = logprobs.prompt(place)
            if reason is not None or not live.started:
                if times is None:
                    times = self._wire.times(message)
                output.timing = self._timing(times[place])
                if not live.started:
                    live.started = True
                    self._totals.prompt_tokens_total += live.prompt_tokens
                    output.cached = self._cached(message, place)
                if reason is not None:
                    output.finish = finish_of(reason, live.aborts > 0)
                    self._forget(rid, live)
                    if output.finish is not None and output.finish.error is not None:
                        # A request that fails before it is computed still gets a token, of no meaning.
                        output.token_ids, output.logprobs = [], []
            self._totals.output_tokens_total += len(output.token_ids)
            by_sink.setdefault(live.sink, []).append(output)
        for sink, outputs in by_sink.items():
            sink(outputs)

    def _on_embeddings(self, message: Any) -> None:
        by_sink: dict[StepSink, list[StepOutput]] = {}
        times = self._wire.times(message)
        for place, rid in enumerate(message.rids):
            live, reason = self._live.get(rid), message.finished_reasons[place]
            if live is None or reason is None:
                continue
            self._forget(rid, live)
            self._totals.prompt_tokens_total += live.prompt_tokens
            output = StepOutput(live.handle, [], finish_of(reason, live.aborts > 0), CachedTokens())
            output.timing = self._timing(times[place])
            if output.finish is not None and output.finish.error is None:
                output.embedding = message.embeddings[place]
            by_sink.setdefault(live.sink, []).append(output)
        for sink, outputs in by_sink.items():
            sink(outputs)

    def _timing(self, times: tuple[float, float, float, int, float] | None) -> Timing | None:
        if times is None:
            return None
        self._totals.transferred_bytes_total += times[3]
        return Timing(*times)

    def _cached(self, message: Any, place: int) -> CachedTokens:
        if not message.cached_tokens[place]:
            return CachedTokens()
        details = self._wire.cached_details(message, place) or {}
        host = details.get("host", 0) + details.get("storage", 0)
        nvme, network = details.get("nvme", 0), details.get("network", 0)
        device = message.cached_tokens[place] - host - nvme - network
        return CachedTokens(device=device, host=host, nvme=nvme, network=network)

    def _finish(self, rid: str, live: _Live, finish: Finish) -> None:
        self._forget(rid, live)
        cached = None if live.started else CachedTokens()
        live.sink([StepOutput(live.handle, [], finish, cached)])

    def _forget(self, rid: str, live: _Live) -> None:
        del self._live[rid]
        if live.again is not None:
            live.again.cancel()

    def load(self) -> EngineLoad:
        load = EngineLoad(
            requests=len(self._live),
            prompt_tokens_total=self._totals.prompt_tokens_total,
            output_tokens_total=self._totals.output_tokens_total,
            transferred_bytes_total=self._totals.transferred_bytes_total,
        )
        if self._load_reader is not None and self._ended is None:
            now, page = self._load_reader.read(), self._info.page_size
            load.queued_requests = now.num_waiting_reqs
            load.blocks_used = -(-now.num_used_tokens // page)
            load.blocks_cached = now.num_cached_tokens // page
            load.transfers = now.transfers
            load.store = now.kvmesh_store or load.store
        return load

    def kv_events(self) -> AsyncGenerator[list[KvEvent], None]:
        return self._events.events()

    async def cache_prompt(self, token_ids: Sequence[int], cache_salt: str = "") -> None:
        meeting = None if self._role is Role.AGGREGATED else Bootstrap(NO_PEER, CACHED, next(self._handles))
        sampling = Sampling(temperature=0, max_new_tokens=1, ignore_eos=True)
        request = EngineRequest("cache-prompt", token_ids, sampling, meeting, cache_salt=cache_salt)
        async with aclosing(self.generate(request)) as outputs:
            async for output in outputs:
                if output.finish is not None and output.finish.error is not None:
                    raise output.finish.error

    async def probe(self) -> Probe:
        totals = replace(self._totals)
        try:
            return await Probing(self._info, self._rehearse, self.abort).measure()
        finally:
            self._totals = totals

    def _rehearse(self, token_ids: Sequence[int], new_tokens: int, sink: StepSink) -> int:
        """Run a prompt with no peer, and leave nothing of it in the cache."""
        if self._ended is not None:
            raise self._ended
        prompt = array("q", token_ids)
        if self._info.embedding_size:
            return self._embed(prompt, 0, sink)
        wanted = Sampling(temperature=0, max_new_tokens=new_tokens, ignore_eos=True)
        sampling = sampling_fields(wanted, self._role, self._info.vocab_size, new_tokens)
        meeting = Bootstrap(NO_PEER, NOT_CACHED, next(self._handles))
        return self._queue(prompt, sampling, sink, **_bootstrap_fields(meeting))

    async def flush_cache(self) -> None:
        if self._ended is not None:
            raise self._ended
        done = self._loop.create_future()
        self._flushes.append(done)
        self._inputs.send(self._wire.flush(), zmq.NOBLOCK)
        try:
            reply = await asyncio.wait_for(done, _FLUSH_S)
        except TimeoutError:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_DEADLINE_EXCEEDED, f"the scheduler did not answer in {_FLUSH_S:.0f} s"
            ) from None
        if not reply.success:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_OVERLOADED, "requests are running; flush the cache when they have ended"
            )

    async def failed(self) -> KvmeshError:
        assert self._process is not None, "start comes first"
        return await asyncio.shield(self._process.failure)

    async def close(self) -> None:
        self._end(KvmeshError(ErrorCode.ERROR_CODE_WORKER_LOST, "the worker is shutting down"))
        if self._process is not None:
            await self._process.close()
        if self._outputs is not None:
            self._outputs.close()
        if self._context is not None:
            self._events.close()
            self._inputs.close(linger=0)
            self._context.term()
            self._context = None
        if self._load_reader is not None:
            self._load_reader.close()
            self._load_reader = None
        _remove_files(self._directory, self._load_file)

    def _end(self, error: KvmeshError) -> None:
        """No request runs any more: tell those that were live."""
        if self._ended is not None:
            return
        self._ended = error
        for rid, live in list(self._live.items()):
            self._finish(rid, live, failed(error))
        for flush in self._flushes:
            if not flush.done():
                flush.set_exception(error)


def _bootstrap_fields(meeting: Bootstrap) -> dict[str, Any]:
    return {
        "bootstrap_host": meeting.host,
        "bootstrap_port": meeting.port,
        "bootstrap_room": meeting.room,
    }


def _remove_files(directory: str, load_file: str) -> None:
    # The launcher does this too, unless it was killed.
    if load_file:
        Path(load_file).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _make_directory() -> str:
    directory = tempfile.mkdtemp(prefix="kvmesh-")
    if len(directory) > _LONGEST_DIRECTORY:
        Path(directory).rmdir()
        directory = tempfile.mkdtemp(prefix="kvmesh-", dir="/tmp")
    return directory
