"""Joins SGLang's cache to the node's KV store (KVBM) by SGLang's seam for external caches.

SGLang offers every page it has written (`offload`) and asks for prefixes its device has evicted
(`lookup`, then `load`). Offloads go through a bounded queue to a thread of their own; loads run layer by
layer on another thread, so that a layer is computed while the next is copied. The scheduler's thread only
asks, with a short deadline; where more blocks are being brought from other nodes, their request stays in its
queue (`onboarding`). Without a store, or with one that dies, the engine goes on as if nothing were
cached there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter, UnifiedCacheLinker
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from kvmesh.common.block_names import tenant_of_salt
from kvmesh.core import Lease
from kvmesh.engine.contract import StoreTraffic
from kvmesh.engine.sglang import idle
from kvmesh.engine.sglang.device_pages import DevicePages, UnsupportedPool, device_pages
from kvmesh.engine.sglang.namespace import shard_of, store_namespace
from kvmesh.engine.sglang.onboarding import LoadTime, Onboarding
from kvmesh.engine.sglang.store_link import StoreLink

log = logging.getLogger(__name__)

# Pages waiting to be offloaded are locked on the device: beyond one request's, at most this part of its pool.
MAX_WAITING_PART = 0.25
_WRAPPER = "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper"


def linker_server_args(
    socket_path: str, worker_id: str, namespace: dict[str, str] | None = None
) -> dict[str, Any]:
    """SGLang's server arguments that join an engine to the store at `socket_path`.

    `namespace` may give `model` and `revision` where the model's files do not tell (see `store_namespace`).
    """
    return {
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {
            "linker": KvbmLinker.__name__,
            "linker_module_path": __name__,
            "linker_extra_config": {
                "socket": socket_path,
                "worker": worker_id,
                "namespace": namespace or {},
            },
        },
    }


@dataclass(frozen=True, slots=True)
class _Load:
    lease: Lease
    pages: list[int]


@dataclass(frozen=True, slots=True)
class _Batch:
    """One request's loads."""

    loads: list[_Load]
    time: LoadTime


@dataclass(slots=True)
class _Chain:
    """What the transfers of an offload do not tell: the page before its first, and whose it is."""

    parent: str | None = None
    tenant: str = ""


@dataclass(slots=True)
class _Offload:
    tenant: str
    parent: bytes | None
    digests: bytes
    slots: torch.Tensor
    pages: int
    ready: list[torch.cuda.Event]
    done: Future[bool] = field(default_factory=Future)


class KvbmLinker(UnifiedCacheLinker):
    """One scheduler's linker; made and called by SGLang."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[Any],
        extra_config: dict[str, Any],
        forward_stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.forward_stream = forward_stream
        self.page_size: int = params.page_size
        self.stats = StoreTraffic()
        self.onboarding = Onboarding(params.page_size)
        self.next_chain = _Chain()
        kvcache = params.token_to_kv_pool_allocator.get_kvcache()
        self.pools = {PoolName.KV: kvcache}
        self._counter = LayerWiseLoadCounter(kvcache.layer_num)
        self.layer_done_counter = self._counter
        self._queued: dict[str, _Batch] = {}
        self._results: deque[Future[bool]] = deque()
        self._waiting = _Count()
        self._link: StoreLink | None = None
        self._pages: DevicePages | None = None
        try:
            self._pages = device_pages(kvcache, params, components)
            namespace = store_namespace(server_args, params, self._pages, extra_config.get("namespace") or {})
        except UnsupportedPool as error:
            log.error("running without the KV store: %s", error)
            return
        self._max_waiting = int(MAX_WAITING_PART * self._pages.count)
        self._link = StoreLink(extra_config["socket"], namespace, self._pages.segments)
        self._alone = shard_of(params).ranks == 1
        worker = extra_config.get("worker", "")
        self._loader = _Worker(f"kvbm-load {worker}")
        self._offloader = _Worker(f"kvbm-offload {worker}")
        HookRegistry.register(f"{_WRAPPER}._offload_node", _note_chain, HookType.BEFORE)
        HookRegistry.apply_hooks()

    # Onboarding: on the scheduler's thread up to the queue, then on the loader's.

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        if self._link is None:
            return []
        found, coming = self._link.lookup(_digests(_kv(transfers)), self.onboarding.per_block_s)
        # Ranks must all go the same way, and each has a store's word on its own part only: they do not wait.
        self.onboarding.coming = rid if coming and self._alone else None
        return list(range(1, found + 1))

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        if self._link is None or self._pages is None:
            return False
        transfer = _kv(transfers)
        keys, pages = transfer.keys or [], self._page_ids(transfer.device_indices)
        loads: list[_Load] = []
        # Leased here, on the scheduler's thread, so that nothing can be evicted before it is copied.
        for start in range(0, len(keys), self._pages.batch):
            part = slice(start, start + self._pages.batch)
            lease = self._link.lease(bytes.fromhex("".join(keys[part])))
            if lease is None:
                self._release(loads)
                if self._alone:
                    # Evicted since the look-up: the prompt is computed instead.
                    return False
                # Other ranks may have it, and all must go the same way: this one's load will fail.
                loads = []
                break
            loads.append(_Load(lease, pages[part]))
        self.onboarding.origins = self._origins(loads)
        self.onboarding.load_time = LoadTime()
        self._queued[rid] = _Batch(loads, self.onboarding.load_time)
        return True

    def start_layer_wise_loading(self) -> int:
        if not self._queued:
            return -1
        batches, self._queued = self._queued, {}
        index = self._counter.update_producer()
        ready = self._now()
        self._loader.put(lambda: self._run_loads(index, list(batches.values()), ready))
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return self._counter.finish(counter_index)

    def cancel_queued_load(self, rid: str) -> bool:
        batch = self._queued.pop(rid, None)
        if batch is None:
            return False
        self._release(batch.loads)
        return True

    def _run_loads(self, index: int, batches: list[_Batch], ready: list[torch.cuda.Event]) -> None:
        assert self._pages is not None
        loads = [load for batch in batches for load in batch.loads]
        began = time.perf_counter()
        try:
            if not all(batch.loads for batch in batches):
                raise LookupError("blocks were evicted between look-up and load")
            for event in ready:
                event.synchronize()
            for layer in range(self._pages.layers):
                for load in loads:
                    self._pages.load(load.lease, load.pages, layer)
                if layer == self._pages.layers - 1:
                    for batch in batches:
                        batch.time.ms = 1e3 * (time.perf_counter() - began)
                self._counter.complete(index, layer)
            self.stats.loaded += sum(len(load.pages) for load in loads)
        except Exception as error:
            # SGLang aborts this batch's requests with a retryable status; a corrupt block is gone by then.
            self.stats.failed_loads += 1
            log.warning("blocks not loaded, their requests are aborted: %s", error)
            self._counter.fail(index, error)
        finally:
            for load in loads:
                load.lease.release()

    def _origins(self, loads: list[_Load]) -> tuple[int, int]:
        """Tokens that came up from the disk and from the network for these loads."""
        nvme, network = (
            sum(tier) for tier in zip((0, 0), *(load.lease.origins for load in loads), strict=True)
        )
        return nvme * self.page_size, network * self.page_size

    def _release(self, loads: list[_Load]) -> None:
        """Without waiting for the store's answer."""
        if loads:
            self._loader.put(lambda: [load.lease.release() for load in loads])

    # Offloading.

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        if self._link is None:
            return False
        transfer = _kv(transfers)
        chain, self.next_chain = self.next_chain, _Chain()
        pages = len(transfer.keys or [])
        slots = transfer.device_indices
        assert slots is not None
        job = _Offload(
            tenant=chain.tenant,
            parent=bytes.fromhex(chain.parent) if chain.parent else None,
            digests=_digests(transfer),
            slots=slots,
            pages=pages,
            ready=self._now(),
        )
        # Answered in order and on every rank alike, so one that is shed is accepted and then fails.
        self._results.append(job.done)
        if self._waiting.value and self._waiting.value + pages > self._max_waiting:
            self.stats.shed += pages
            log.info("offload of %d pages shed, the copier is behind; %d in all", pages, self.stats.shed)
            job.done.set_result(False)
        else:
            self._waiting.add(pages)
            self._offloader.put(lambda: self._run_offload(job))
        return True

    def num_completed_offloads(self) -> int:
        count = 0
        for result in self._results:
            if not result.done():
                break
            count += 1
        return count

    def pop_completed_offload(self) -> bool:
        return self._results.popleft().result()

    def _run_offload(self, job: _Offload) -> None:
        assert self._pages is not None
        assert self._link is not None
        stored = False
        try:
            for event in job.ready:
                event.synchronize()
            ids = self._page_ids(job.slots)
            stored = self._link.offload(self._pages, job.tenant, job.parent, job.digests, ids)
        except Exception as error:
            log.error("offload failed: %s", error)
        if stored:
            self.stats.offloaded += job.pages
        else:
            self.stats.refused += job.pages
        self._waiting.add(-job.pages)
        job.done.set_result(stored)
        # An idle scheduler has to let go of the pages.
        idle.wake()

    # Life.

    def reset(self) -> None:
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        if self._link is not None:
            self._loader.wait()
            self._offloader.wait()
        self._results.clear()
        self._counter.reset()

    def close(self) -> None:
        self.reset()
        if self._link is not None:
            self._loader.stop()
            self._offloader.stop()
            self._link.close()
            self._link = None

    def _now(self) -> list[torch.cuda.Event]:
        """What a copy must wait for before it touches pages: nothing on a CPU, whose steps block."""
        on_device = self._pages is not None and self._pages.on_device
        return self.record_offload_ready() if on_device else []

    def _page_ids(self, slots: torch.Tensor | None) -> list[int]:
        """The pages of token slots, which SGLang hands out page by page."""
        assert slots is not None
        pages = slots.reshape(-1, self.page_size)[:, 0]
        return (pages // self.page_size).tolist()


class _Count:
    """A number that several threads change."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def add(self, change: int) -> None:
        with self._lock:
            self.value += change


class _Worker:
    """A thread that runs what is put, one after the other."""

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, task: Callable[[], Any]) -> None:
        self._tasks.put(task)

    def wait(self) -> None:
        """Until everything put so far has run."""
        done = threading.Event()
        self._tasks.put(done.set)
        done.wait()

    def stop(self) -> None:
        self._tasks.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception:
                log.exception("a task of the KV store's linker failed")


def _kv(transfers: list[PoolTransfer]) -> PoolTransfer:
    return next(transfer for transfer in transfers if transfer.name == PoolName.KV)


def _digests(transfer: PoolTransfer) -> bytes:
    """Keys are SHA-256 page hashes in hexadecimal."""
    return bytes.fromhex("".join(transfer.keys or []))


def _note_chain(wrapper: Any, node_id: Any, transfers: list[PoolTransfer]) -> None:
    """Before the cache offloads a node: tell which page comes before its first, and whose the pages are.

    The store evicts chains from their tails, and needs to know what follows what.
    """
    if isinstance(wrapper.cache_linker, KvbmLinker):
        prefix = wrapper.cache.get_prefix_hash_values(node_id)
        _, salt = wrapper.cache.tree_core.prefetch_anchor_info(node_id)
        tenant = tenant_of_salt(salt or "")
        wrapper.cache_linker.next_chain = _Chain(prefix[-1] if prefix else None, tenant)
