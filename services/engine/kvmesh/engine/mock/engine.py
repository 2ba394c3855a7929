"""The mock engine: the contract's face of scheduler, pool, timing and transfer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

import structlog

from kvmesh.common.config import Config
from kvmesh.common.errors import KvmeshError
from kvmesh.engine.contract import (
    CachedTokens,
    Engine,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    Finish,
    FinishReason,
    KvEvent,
    Probe,
    Role,
    StepOutput,
    StepSink,
)
from kvmesh.engine.mock.blocks import BlockPool, page_hashes
from kvmesh.engine.mock.embeddings import embed
from kvmesh.engine.mock.live import LiveRequest, Outputs
from kvmesh.engine.mock.scheduler import Decode, Prefill, Scheduler
from kvmesh.engine.mock.timing import Pacer, TimingModel
from kvmesh.engine.mock.tokens import TokenSource, Vocabulary, finish_after, prompt_logprobs
from kvmesh.engine.mock.transfer import BootstrapServer, Handover, Peer, receive
from kvmesh.engine.mock.validation import check_request
from kvmesh.v1.errors_pb2 import ErrorCode

log = structlog.get_logger()

Sleep = Callable[[float], Awaitable[None]]


class MockEngine(Engine):
    """`clock` (seconds) and `sleep` are the engine's only notion of time; they can be virtual."""

    def __init__(
        self,
        config: Config,
        role: Role,
        *,
        model_path: str,
        worker_id: str,
        bootstrap_host: str = "127.0.0.1",
        kvbm_socket: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """`kvbm_socket` is taken for the other engines' sake: there are no bytes to keep in lower tiers."""
        mock = config.engine.mock
        self._config = config
        self._role = role
        self._model_path = model_path
        self._bootstrap_host = bootstrap_host
        self._clock = clock
        self._sleep = sleep
        self._timeout_s = mock.bootstrap_timeout_s
        self._block_bytes = mock.block_bytes
        self._page_size = mock.page_size
        self._pool = BlockPool(mock.total_blocks)
        self._scheduler = Scheduler(self._pool, mock.page_size, mock.max_batch)
        self._timing = TimingModel(mock)
        self._pacer = Pacer(clock, sleep)
        self._rooms = BootstrapServer(self._timeout_s)
        self._vocabulary = Vocabulary((), ())
        self._info: EngineInfo | None = None
        self._live: dict[int, LiveRequest] = {}
        self._last_handle = 0
        self._load = EngineLoad()
        self._peers: dict[int, Peer] = {}
        self._waits: dict[int, asyncio.TimerHandle] = {}
        self._transfers: dict[int, asyncio.Task[None]] = {}
        self._arrived: list[tuple[LiveRequest, Handover]] = []
        self._wake = asyncio.Event()
        self._events: asyncio.Queue[list[KvEvent]] = asyncio.Queue()
        self._loop_task: asyncio.Task[None] | None = None
        self._death: asyncio.Future[KvmeshError] | None = None
        self._closed = False

    async def start(self) -> EngineInfo:
        mock = self._config.engine.mock
        self._vocabulary = await asyncio.to_thread(Vocabulary.load, self._model_path, mock.vocab_size)
        port = 0
        if self._role is Role.PREFILL:
            worker = self._config.worker
            port = await self._rooms.start(worker.host, worker.bootstrap_port)
        self._death = asyncio.get_running_loop().create_future()
        self._info = EngineInfo(
            role=self._role,
            # A request must fit the pool alone, or it could never finish.
            context_length=min(
                mock.context_length,
                mock.total_blocks * mock.page_size,
                self._config.model.context_length or mock.context_length,
            ),
            vocab_size=mock.vocab_size,
            page_size=mock.page_size,
            total_blocks=mock.total_blocks,
            block_bytes=mock.block_bytes,
            eos_token_ids=self._vocabulary.eos,
            device="mock",
            pass_tokens=mock.context_length,
            bootstrap_host=self._bootstrap_host if port else "",
            bootstrap_port=port,
            embedding_size=mock.embedding_size if self._config.model.task == "embed" else 0,
            adapters=tuple(mock.adapters),
        )
        self._loop_task = asyncio.create_task(self._run(), name="mock-engine")
        return self._info

    def submit(self, request: EngineRequest, sink: StepSink) -> int:
        if self._info is None or self._closed or (self._loop_task is not None and self._loop_task.done()):
            raise KvmeshError(ErrorCode.ERROR_CODE_ENGINE_FAILED, "the engine is not running")
        check_request(request, self._info)
        self._last_handle += 1
        prompt = len(request.token_ids)
        room = self._info.context_length - prompt
        live = LiveRequest(
            handle=self._last_handle,
            request=request,
            sink=sink,
            source=TokenSource(self._vocabulary, request.token_ids, request.sampling),
            limit=1 if self._role is Role.PREFILL else min(request.sampling.max_new_tokens or room, room),
            submitted_at=self._clock(),
        )
        self._live[live.handle] = live
        self._load.prompt_tokens_total += prompt
        if self._role is Role.PREFILL:
            self._await_peer(live)
        elif self._role is Role.DECODE:
            self._scheduler.enqueue_receivable(live)
        else:
            self._scheduler.enqueue(live)
        self._wake.set()
        return live.handle

    def abort(self, handle: int) -> None:
        live = self._live.get(handle)
        if live is not None:
            self._end_soon(live, Finish(FinishReason.CANCELLED))

    def load(self) -> EngineLoad:
        load = self._load
        load.requests = len(self._live)
        load.queued_requests = self._scheduler.queued + len(self._waits)
        load.blocks_used = self._pool.used
        load.blocks_cached = self._pool.idle
        load.transfers = len(self._transfers)
        return load

    async def kv_events(self) -> AsyncGenerator[list[KvEvent], None]:
        while True:
            yield await self._events.get()

    async def cache_prompt(self, token_ids: Sequence[int], cache_salt: str = "") -> None:
        chain = page_hashes(token_ids, self._page_size, cache_salt)
        await self._sleep(self._timing.prefill_s(len(token_ids)))
        allocation = self._pool.allocate(chain, len(chain), len(chain))
        if allocation is None:
            raise KvmeshError(ErrorCode.ERROR_CODE_OVERLOADED, "no room for the prompt's blocks")
        self._pool.store(allocation, chain)
        self._pool.release(allocation)
        self._emit_events()

    async def probe(self) -> Probe:
        return self._timing.probe(self._role, embeds=bool(self._embeds))

    async def flush_cache(self) -> None:
        if self._live:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_OVERLOADED,
                f"{len(self._live)} requests run; flush the cache when the worker is idle",
            )
        self._pool.clear()
        self._emit_events()

    async def failed(self) -> KvmeshError:
        assert self._death is not None, "the engine was not started"
        return await asyncio.shield(self._death)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        self._fail_all(KvmeshError(ErrorCode.ERROR_CODE_UNAVAILABLE, "the engine was stopped"))
        transfers = list(self._transfers.values())
        for task in transfers:
            task.cancel()
        await asyncio.gather(*transfers, return_exceptions=True)
        await self._rooms.close()

    # The engine's loop: one step after the other.

    async def _run(self) -> None:
        try:
            while True:
                self._wake.clear()
                self._take_arrived()
                for live in self._scheduler.admit_receivable():
                    self._receive(live)
                step = self._scheduler.next_step()
                self._emit_events()
                if step is None:
                    self._pacer.rest()
                    await self._wake.wait()
                elif isinstance(step, Prefill):
                    await self._prefill(step)
                else:
                    await self._decode(step)
        except Exception as error:
            log.exception("mock engine failed")
            failure = KvmeshError(ErrorCode.ERROR_CODE_ENGINE_FAILED, f"mock engine: {error!r}")
            self._fail_all(failure)
            assert self._death is not None
            self._death.set_result(failure)

    async def _prefill(self, step: Prefill) -> None:
        now = self._clock()
        for live in step.batch:
            if live.started_at is None:
                live.started_at = now
                live.cached = live.computed
        await self._pacer.step(self._timing.prefill_s(step.uncached))
        took = self._clock() - now
        outputs: Outputs = {}
        for live in step.batch:
            if live.finished is None:
                live.prefill_s += took
                self._scheduler.computed(live)
                if self._role is Role.PREFILL:
                    self._send(live)
                elif self._embeds:
                    self._embed(live, outputs)
                else:
                    self._scheduler.run(live)
                    self._generate(live, outputs)
        self._deliver(outputs)

    @property
    def _embeds(self) -> int:
        """Numbers in its vectors; 0: it generates."""
        return self._info.embedding_size if self._info is not None else 0

    def _embed(self, live: LiveRequest, outputs: Outputs) -> None:
        finish = Finish(FinishReason.STOP)
        self._forget(live, finish)
        outputs.setdefault(live.sink, []).append(
            StepOutput(
                live.handle,
                (),
                finish,
                CachedTokens(device=live.cached),
                live.timing(),
                embedding=embed(live.request.token_ids, self._embeds),
            )
        )

    async def _decode(self, step: Decode) -> None:
        await self._pacer.step(self._timing.decode_s(len(step.batch)))
        outputs: Outputs = {}
        for live in step.batch:
            if live.finished is None:
                self._scheduler.advance(live)
                self._generate(live, outputs)
        self._deliver(outputs)

    def _generate(self, live: LiveRequest, outputs: Outputs) -> None:
        may_end = len(live.output) + 1 >= live.request.sampling.min_new_tokens
        self._append(live, live.source.next(may_end=may_end), outputs)

    def _append(self, live: LiveRequest, token: int, outputs: Outputs) -> None:
        live.output.append(token)
        self._load.output_tokens_total += 1
        finish = finish_after(
            live.request.sampling, self._vocabulary.eos, token, len(live.output), live.limit
        )
        output = StepOutput(live.handle, (token,), finish)
        if live.source.logprob is not None:
            output.logprobs = (live.source.logprob,)
        if finish is not None:
            self._forget(live, finish)
            output.timing = live.timing()
        if not live.reported:
            live.reported = True
            output.cached = CachedTokens(device=live.cached)
            output.timing = live.timing()
            if live.request.sampling.prompt_logprobs and self._role is not Role.DECODE:
                output.prompt_logprobs = prompt_logprobs(
                    self._vocabulary, live.request.token_ids, live.request.sampling
                )
        outputs.setdefault(live.sink, []).append(output)

    # Prefill: wait for the peer, compute, hand over.

    def _await_peer(self, live: LiveRequest) -> None:
        bootstrap = live.request.bootstrap
        assert bootstrap is not None
        self._waits[live.handle] = asyncio.get_running_loop().call_later(
            self._timeout_s, self._peer_missing, live
        )
        self._rooms.expect(bootstrap.room, lambda peer: self._peer_came(live, peer))

    def _peer_came(self, live: LiveRequest, peer: Peer) -> None:
        self._waits.pop(live.handle).cancel()
        self._peers[live.handle] = peer
        peer.on_left = lambda: self._peer_left(live)
        peer.accept()
        self._scheduler.enqueue(live)
        self._wake.set()

    def _peer_missing(self, live: LiveRequest) -> None:
        self._end_soon(live, _lost(f"no decode engine came for the request within {self._timeout_s:g} s"))

    def _peer_left(self, live: LiveRequest) -> None:
        self._peers.pop(live.handle, None)
        self._end_soon(live, _lost("the decode engine gave the request up"))

    def _send(self, live: LiveRequest) -> None:
        self._transfers[live.handle] = asyncio.create_task(self._hand_over(live))

    async def _hand_over(self, live: LiveRequest) -> None:
        peer = self._peers[live.handle]
        blocks = -(-len(live.request.token_ids) // self._page_size) - peer.cached_blocks
        began = self._clock()
        live.transfer_bytes = max(0, blocks) * self._block_bytes
        await self._sleep(self._timing.transfer_s(live.transfer_bytes))
        live.transfer_s = self._clock() - began
        token = live.source.next(may_end=live.request.sampling.min_new_tokens <= 1)
        self._load.transferred_bytes_total += live.transfer_bytes
        del self._peers[live.handle]
        peer.hand_over(Handover(token, live.transfer_bytes, live.transfer_s, live.cached))
        outputs: Outputs = {}
        self._append(live, token, outputs)
        self._deliver(outputs)

    # Decode: meet the prefill engine, then generate.

    def _receive(self, live: LiveRequest) -> None:
        live.started_at = self._clock()
        self._transfers[live.handle] = asyncio.create_task(
            self._fetch(live, live.computed // self._page_size)
        )

    async def _fetch(self, live: LiveRequest, cached_blocks: int) -> None:
        assert live.request.bootstrap is not None
        try:
            handover = await receive(live.request.bootstrap, cached_blocks, self._timeout_s)
        except KvmeshError as error:
            self._end_soon(live, Finish(FinishReason.ERROR, error=error))
            return
        del self._transfers[live.handle]
        self._arrived.append((live, handover))
        self._wake.set()

    def _take_arrived(self) -> None:
        arrived, self._arrived = self._arrived, []
        outputs: Outputs = {}
        for live, handover in arrived:
            if live.finished is None:
                live.cached = handover.cached
                live.transfer_s = handover.transfer_s
                live.transfer_bytes = handover.bytes
                self._load.transferred_bytes_total += handover.bytes
                self._scheduler.computed(live)
                self._scheduler.run(live)
                live.source.append(handover.token)
                self._append(live, handover.token, outputs)
        self._deliver(outputs)

    # Ends.

    def _end_soon(self, live: LiveRequest, finish: Finish) -> None:
        """Free everything now and tell the sink from the event loop: the caller may be the sink's owner."""
        if live.finished is None:
            self._forget(live, finish)
            output = StepOutput(live.handle, (), finish, timing=live.timing())
            if not live.reported:
                output.cached = CachedTokens(device=live.cached)
            asyncio.get_running_loop().call_soon(live.sink, [output])

    def _forget(self, live: LiveRequest, finish: Finish) -> None:
        live.finished = finish
        del self._live[live.handle]
        self._scheduler.drop(live)
        wait = self._waits.pop(live.handle, None)
        if wait is not None:
            wait.cancel()
            assert live.request.bootstrap is not None
            self._rooms.forget(live.request.bootstrap.room)
        peer = self._peers.pop(live.handle, None)
        if peer is not None:
            peer.close()
        transfer = self._transfers.pop(live.handle, None)
        if transfer is not None and transfer is not asyncio.current_task():
            transfer.cancel()
        self._emit_events()
        self._wake.set()

    def _fail_all(self, error: KvmeshError) -> None:
        for live in list(self._live.values()):
            self._end_soon(live, Finish(FinishReason.ERROR, error=error))

    def _deliver(self, outputs: Outputs) -> None:
        for sink, batch in outputs.items():
            sink(batch)

    def _emit_events(self) -> None:
        events = self._pool.take_events()
        if events:
            self._events.put_nowait(events)


def _lost(message: str) -> Finish:
    return Finish(FinishReason.ERROR, error=KvmeshError(ErrorCode.ERROR_CODE_WORKER_LOST, message))
