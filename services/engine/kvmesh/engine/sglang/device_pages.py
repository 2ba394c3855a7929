"""An engine's KV pages as the store sees them: segments in memory, layer by layer.

On a CPU the store copies straight from and to the engine's tensors. On a GPU pages pass through pinned
memory on a stream of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, MHABufferInfo, MLABufferInfo
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from kvmesh.core import Lease, Pages, StoreClient

# Pinned memory of each direction on a GPU, at most, unless one page is larger.
STAGING_BYTES = 64 << 20


class UnsupportedPool(Exception):
    """Blocks of this engine cannot be stored; the message says why."""


class DevicePages(ABC):
    """The pages of one pool. `offload` and `load` may run at the same time, each on one thread."""

    # Whether pages are on a GPU, so that copies have to wait for its events.
    on_device: bool
    # Pages that one `load` takes at most.
    batch: int

    def __init__(self, buffers: list[torch.Tensor], per_layer: int, page_size: int, layout: str) -> None:
        """`buffers` hold token rows; each is one segment of a page, `per_layer` of them to a layer."""
        self.buffers = [_rows(buffer, page_size) for buffer in buffers]
        self.per_layer = per_layer
        self.layers = len(buffers) // per_layer
        self.layout = layout
        self.dtype = str(buffers[0].dtype)
        self.count = min(rows.shape[0] for rows in self.buffers)
        # Bytes of each segment of a page.
        self.segments = [rows.shape[1] for rows in self.buffers]
        # Whether tensor-parallel ranks hold copies of the same pages instead of parts.
        self.replicated = False

    @abstractmethod
    def offload(
        self, client: StoreClient, parent: bytes | None, digests: bytes, ids: list[int], tenant: str = ""
    ) -> bool:
        """Store a tenant's pages `ids`, in chain order; whether the store has all of them now."""

    @abstractmethod
    def load(self, lease: Lease, ids: list[int], layer: int) -> None:
        """Fill one layer of the pages `ids` from the store; done when this returns."""


class HostPages(DevicePages):
    """Pages in this process's memory."""

    on_device = False
    batch = 1 << 16

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pages = _describe(self.buffers, self.segments, self.count)

    def offload(
        self, client: StoreClient, parent: bytes | None, digests: bytes, ids: list[int], tenant: str = ""
    ) -> bool:
        _, _, full = client.offload(parent, digests, self._pages, ids, tenant)
        return full == 0

    def load(self, lease: Lease, ids: list[int], layer: int) -> None:
        first = layer * self.per_layer
        lease.load(self._pages, ids, first, first + self.per_layer)


class CudaPages(DevicePages):
    """Pages on a GPU, staged in pinned memory block by block."""

    on_device = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batch = max(1, min(self.count, STAGING_BYTES // sum(self.segments)))
        self._out = Staging(self.batch, self.buffers)
        self._in = Staging(self.batch, self.buffers)

    def offload(
        self, client: StoreClient, parent: bytes | None, digests: bytes, ids: list[int], tenant: str = ""
    ) -> bool:
        for start in range(0, len(ids), self.batch):
            part = ids[start : start + self.batch]
            self._out.gather(part)
            chain = digests[32 * start : 32 * (start + len(part))]
            _, _, full = client.offload(parent, chain, self._out.pages, list(range(len(part))), tenant)
            if full:
                return False
            parent = chain[-32:]
        return True

    def load(self, lease: Lease, ids: list[int], layer: int) -> None:
        first, end = layer * self.per_layer, (layer + 1) * self.per_layer
        lease.load(self._in.pages, list(range(len(ids))), first, end)
        self._in.scatter(ids, first, end)


class Staging:
    """Pinned blocks, and the stream that copies pages of a GPU from and to them. Belongs to one thread."""

    def __init__(self, blocks: int, buffers: list[torch.Tensor]) -> None:
        """`buffers` hold a page a row, on the GPU."""
        self._buffers = buffers
        self._stream = torch.cuda.Stream(buffers[0].device)
        segments = [rows.shape[1] for rows in buffers]
        # One tensor a segment keeps each copy contiguous.
        self._columns = [torch.empty(blocks, size, dtype=torch.uint8, pin_memory=True) for size in segments]
        self.pages = _describe(self._columns, segments, blocks)

    def gather(self, ids: list[int]) -> None:
        """Copy these pages to the first blocks; they are there when this returns."""
        with torch.cuda.stream(self._stream):
            rows = torch.tensor(ids, device=self._buffers[0].device)
            for buffer, staged in zip(self._buffers, self._columns, strict=True):
                staged[: len(ids)].copy_(buffer.index_select(0, rows), non_blocking=True)
        self._stream.synchronize()

    def scatter(self, ids: list[int], first: int, end: int) -> None:
        """Copy segments `first` to `end` of the first blocks to these pages; done when it returns."""
        with torch.cuda.stream(self._stream):
            rows = torch.tensor(ids, device=self._buffers[0].device)
            for segment in range(first, end):
                staged = self._columns[segment][: len(ids)]
                self._buffers[segment].index_copy_(0, rows, staged.to(rows.device, non_blocking=True))
        # Also before the blocks are filled again.
        self._stream.synchronize()


def device_pages(pool: Any, params: Any, components: set[Any]) -> DevicePages:
    """The pages of SGLang's pool. Raises UnsupportedPool for one that holds more than plain K and V rows."""
    if components != {ComponentType.FULL}:
        names = ", ".join(sorted(component.name.lower() for component in components))
        raise UnsupportedPool(f"the model's cache has {names} state; only full attention is supported")
    if params.mtp_draft_device_pools or params.sidecar_draft_device_pools or params.mtp_draft_mamba_pools:
        raise UnsupportedPool("speculative decoding's draft KV is not supported")
    # Subclasses keep more than these two do: quantization scales, index keys.
    if type(pool) not in (MHATokenToKVPool, MLATokenToKVPool):
        raise UnsupportedPool(f"pools of type {type(pool).__name__} are not supported")
    (pool_info,) = pool.get_device_pool_infos()
    info = pool_info.buffer_info
    if pool_info.pool_name != PoolName.KV or info.scales is not None:
        raise UnsupportedPool("a KV cache with quantization scales is not supported")
    kind = HostPages if info.device.type == "cpu" else CudaPages
    if info.device.type not in ("cpu", "cuda"):
        raise UnsupportedPool(f"{info.device.type} devices are not supported")
    layers = f"{pool.start_layer}+{pool.layer_num}"
    if isinstance(info, MHABufferInfo):
        if info.buffers.layout is not KVBufferLayout.NHD or info.transfer_buffers is not None:
            raise UnsupportedPool(f"the KV layout {info.buffers.layout.value} is not supported; use NHD")
        buffers = [side for layer in zip(info.buffers.k, info.buffers.v, strict=True) for side in layer]
        layout = f"nhd page={info.page_size} heads={info.head_num} k={info.head_dim} v={info.v_head_dim}"
        return kind(buffers, 2, info.page_size, f"{layout} layers={layers}")
    if (
        not isinstance(info, MLABufferInfo)
        or not isinstance(info.buffers, tuple)
        or len(info.buffers) != pool.layer_num
    ):
        raise UnsupportedPool("an MLA cache whose layers are split or sharded is not supported")
    layout = f"mla page={info.page_size} width={info.kv_cache_dim} fp8={info.packed_fp8}"
    pages = kind(list(info.buffers), 1, info.page_size, f"{layout} layers={layers}")
    pages.replicated = True
    return pages


def _rows(buffer: torch.Tensor, page_size: int) -> torch.Tensor:
    """A token buffer as bytes, one row a page."""
    if not buffer.is_contiguous():
        raise UnsupportedPool("KV buffers that are not contiguous are not supported")
    pages = buffer.shape[0] // page_size
    return buffer[: pages * page_size].view(torch.uint8).reshape(pages, -1)


def _describe(buffers: list[torch.Tensor], segments: list[int], count: int) -> Pages:
    bases = [buffer.data_ptr() for buffer in buffers]
    return Pages(list(buffers), bases, segments, segments, count)
