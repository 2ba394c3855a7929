"""An engine's pages go to the store and come back bit for bit: from a CPU, and from a GPU where one is."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fixtures.kvbm import MIB, chain
from kvmesh.core import StoreClient, StoreServer

LAYERS, PAGES, PAGE_SIZE, WIDTH = 4, 96, 16, 64

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_cuda])])
def pages(request: pytest.FixtureRequest, sg: SimpleNamespace) -> Any:
    """`DevicePages` of either kind."""
    tokens = PAGES * PAGE_SIZE
    buffers = [torch.randn(tokens, WIDTH, device=request.param) for _ in range(2 * LAYERS)]
    kinds = {"cpu": sg.device_pages.HostPages, "cuda": sg.device_pages.CudaPages}
    return kinds[request.param](buffers, 2, PAGE_SIZE, "test")


@pytest.fixture
def client(pages: Any, tmp_path: Path) -> Iterator[StoreClient]:
    socket = str(tmp_path / "kvbm.sock")
    store = StoreServer(socket, 64 * MIB, str(tmp_path))
    client = StoreClient(
        socket,
        model="m",
        revision="1",
        dtype=pages.dtype,
        layout=pages.layout,
        rank=0,
        ranks=1,
        segments=pages.segments,
        engine=os.getpid(),
        timeout_s=20,
    )
    client.connect()
    yield client
    client.close()
    store.stop()


def test_scattered_pages_come_back_to_other_places(pages: Any, client: StoreClient) -> None:
    ids = random.Random(3).sample(range(PAGES), PAGES // 2)
    free = [page for page in range(PAGES) if page not in ids]
    wanted = [buffer[ids].cpu() for buffer in pages.buffers]
    assert pages.offload(client, None, chain(len(ids)), ids)
    for buffer in pages.buffers:
        buffer[ids] = 0
    lease = client.lease(chain(len(ids)))
    assert lease is not None
    assert len(lease) == len(ids)
    for layer in range(pages.layers):
        pages.load(lease, free, layer)
    lease.release()
    for buffer, was in zip(pages.buffers, wanted, strict=True):
        assert torch.equal(buffer[free].cpu(), was)
        assert not buffer[ids].any()


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("pages", ["cuda"], indirect=True)
def test_copies_do_not_wait_for_what_is_computed(pages: Any, client: StoreClient) -> None:
    ids = list(range(8))
    assert pages.offload(client, None, chain(8), ids)
    computed = torch.cuda.Event()
    torch.cuda._sleep(4_000_000_000)  # seconds of the compute stream
    computed.record()
    assert pages.offload(client, None, chain(8, 100), ids)
    assert not computed.query(), "the copy went behind the computation"
    computed.synchronize()
