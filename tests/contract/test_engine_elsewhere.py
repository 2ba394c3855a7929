"""A real engine's first request for a prompt takes the blocks that another node computed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from fixtures.engines import Running, check_outputs, fresh_prompt, request, tokens_of
from fixtures.kvbm import MIB, Kvbm
from fixtures.mesh import SHALLOW
from fixtures.nats import NatsServer
from fixtures.waiting import eventually
from kvmesh.common.config import load_config
from kvmesh.engine.contract import Role
from kvmesh.engine.model import resolve_model
from kvmesh.engine.registry import make_engine

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]

PAGES = 120


async def started(store: Kvbm) -> Running:
    """An engine beside a store."""
    config: dict[str, Any] = {
        "model": {"dtype": "float32"},
        "engine": {"kind": "sglang", "args": {"max_total_tokens": 8192, **SHALLOW}},
    }
    loaded = load_config(overrides=config)
    engine = make_engine(
        loaded,
        Role.AGGREGATED,
        model_path=resolve_model(loaded).path,
        worker_id="aggregated-0",
        bootstrap_host="127.0.0.1",
        kvbm_socket=store.socket,
    )
    running = Running(engine, await engine.start())
    await eventually(lambda: figure(store, "engines") == 1, 30, "the engine to find its store")
    return running


def figure(store: Kvbm, name: str) -> int:
    """One of a store's metrics."""
    text = httpx.get(f"http://127.0.0.1:{store.metrics_port}/metrics").text
    (line,) = [line for line in text.splitlines() if line.startswith(f"kvmesh_kvbm_{name} ")]
    return int(float(line.split()[-1]))


async def test_a_prompt_that_another_node_has_computed_is_not_computed_again(
    tmp_path: Path, nats: NatsServer
) -> None:
    stores: list[Kvbm] = []
    try:
        for name in ("a", "b"):
            (home := tmp_path / name).mkdir()
            store = Kvbm(home, nats.url, host_bytes=256 * MIB)
            store.environment |= {"KVMESH_NODE": f"node-{name}", "KVMESH_KVBM__ID": f"kvbm-{name}"}
            stores.append(store)
            await store.start()
        first = await started(stores[0])
        try:
            page = first.info.page_size
            prompt = fresh_prompt(PAGES * page + 5)
            outputs = await first.run(request(prompt))
            check_outputs(outputs)
            text = tokens_of(outputs)
            await eventually(
                lambda: figure(stores[0], 'blocks{tier="host"}') >= PAGES, 30, "the prompt to be offloaded"
            )
        finally:
            await first.close()
        second = await started(stores[1])
        try:
            # It learns here how fast it computes; until then it waits for nobody.
            check_outputs(await second.run(request(fresh_prompt(40 * page))))
            outputs = await second.run(request(prompt))
            check_outputs(outputs)
            assert outputs[0].cached is not None
            assert outputs[0].cached.network >= (PAGES - 1) * page
            assert outputs[0].cached.device + outputs[0].cached.host + outputs[0].cached.nvme == 0
            assert tokens_of(outputs) == text
            again = await second.run(request(prompt))
            assert again[0].cached is not None
            assert again[0].cached.device >= (PAGES - 1) * page
            assert again[0].cached.network == 0
        finally:
            await second.close()
    finally:
        for store in stores:
            if store.process is not None and store.process.poll() is None:
                store.end(signal.SIGKILL)
