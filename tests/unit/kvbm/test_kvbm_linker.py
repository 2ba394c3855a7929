"""SGLang's linker against a real store, on real CPU pools, without an engine."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvmesh.core import StoreServer
from kvmesh.engine.contract import StoreTraffic
from kvmesh.engine.sglang.load import SchedulerLoad

# The first test imports SGLang.
pytestmark = pytest.mark.timeout(300)

PAGE = 4
TOKENS = 256
LAYERS = 3

Link = Callable[..., Any]


class Kit:
    """SGLang's classes, and pools filled with noise."""

    def __init__(self, sg: Any) -> None:
        self.sg = sg
        self.full = {sg.component_type.ComponentType.FULL}

    def mha(self) -> Any:
        pool = self.sg.memory_pool.MHATokenToKVPool(
            size=TOKENS,
            page_size=PAGE,
            dtype=self.sg.torch.float32,
            head_num=2,
            head_dim=8,
            v_head_dim=16,
            layer_num=LAYERS,
            device="cpu",
            enable_memory_saver=False,
        )
        return self._fill(pool, [*pool.k_buffer, *pool.v_buffer])

    def mla(self) -> Any:
        pool = self.sg.memory_pool.MLATokenToKVPool(
            size=TOKENS,
            page_size=PAGE,
            dtype=self.sg.torch.bfloat16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            layer_num=LAYERS,
            device="cpu",
            enable_memory_saver=False,
        )
        return self._fill(pool, pool.kv_buffer)

    def _fill(self, pool: Any, buffers: list[Any]) -> Any:
        for buffer in buffers:
            buffer.copy_(self.sg.torch.randn(buffer.shape))
        pool.test_buffers = buffers
        return pool

    def transfer(self, chain: list[str], first_page: int = 0) -> list[Any]:
        slots = self.sg.torch.arange(first_page * PAGE, (first_page + len(chain)) * PAGE)
        storage = self.sg.hicache_storage
        return [storage.PoolTransfer(name=storage.PoolName.KV, keys=chain, device_indices=slots)]

    def equal(self, one: list[Any], other: list[Any]) -> bool:
        return all(self.sg.torch.equal(a, b) for a, b in zip(one, other, strict=True))


def keys(name: str, pages: int) -> list[str]:
    return [hashlib.sha256(f"{name}{page}".encode()).hexdigest() for page in range(pages)]


def rows(pool: Any, first_page: int, pages: int) -> list[Any]:
    span = slice(first_page * PAGE, (first_page + pages) * PAGE)
    return [buffer[span].clone() for buffer in pool.test_buffers]


def eventually(condition: Callable[[], object], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def kit(sg: Any) -> Kit:
    return Kit(sg)


@pytest.fixture
def socket(tmp_path: Path) -> str:
    return str(tmp_path / "kvbm.sock")


@pytest.fixture
def store(socket: str, tmp_path: Path) -> Iterator[StoreServer]:
    server = StoreServer(socket, 4 << 20, str(tmp_path))
    yield server
    server.stop()


@pytest.fixture
def link(socket: str, kit: Kit) -> Iterator[Link]:
    linkers: list[Any] = []

    def make(
        pool: Any,
        components: set[Any] | None = None,
        connect: bool = True,
        server: dict[str, Any] | None = None,
        shard: dict[str, int] | None = None,
    ) -> Any:
        params = SimpleNamespace(
            page_size=PAGE,
            token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
            mtp_draft_device_pools=(),
            sidecar_draft_device_pools=(),
            mtp_draft_mamba_pools=(),
            attn_tp_cache_group=None,
            tp_cache_group=None,
            **{"pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1, **(shard or {})},
        )
        numerics = {"dtype": "auto", "quantization": None, "json_model_override_args": "{}", **(server or {})}
        server_args = SimpleNamespace(**numerics)
        given = {"model": "m", "revision": "1"}
        arguments = kit.sg.linker.linker_server_args(socket, "worker-0", given)[
            "unified_cache_external_linker_config"
        ]
        linker = kit.sg.linker.KvbmLinker(
            server_args,
            params,
            components=components or kit.full,
            extra_config=arguments["linker_extra_config"],
        )
        linkers.append(linker)
        if connect:
            inner = linker._link
            assert inner is not None
            eventually(lambda: inner._ask.connected and inner._copy.connected)
        return linker

    yield make
    for linker in linkers:
        linker.close()


def offload(linker: Any, transfers: list[Any]) -> bool:
    assert linker.offload(transfers)
    eventually(linker.num_completed_offloads)
    return linker.pop_completed_offload()


def load(linker: Any, transfers: list[Any]) -> bool:
    assert linker.load("r", transfers)
    index = linker.start_layer_wise_loading()
    counter = linker.layer_done_counter
    counter.set_consumer(index)
    for layer in range(LAYERS):
        counter.wait_until(layer)
    return linker.finish_layer_wise_loading(index)


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_pages_come_back_into_other_slots_and_other_engines(
    kind: str, store: StoreServer, link: Link, kit: Kit
) -> None:
    make = getattr(kit, kind)
    pool, other = make(), make()
    linker, reader = link(pool), link(other)
    chain = keys("a", 10)
    expected = rows(pool, 2, 10)
    assert offload(linker, kit.transfer(chain, 2))
    assert reader.lookup("r", kit.transfer([*chain, *keys("b", 2)])) == list(range(1, 11))
    assert load(reader, kit.transfer(chain, 30))
    assert reader.onboarding.load_time.ms > 0
    assert kit.equal(rows(other, 30, 10), expected)
    assert store.stats()["loaded"] == 10
    eventually(lambda: store.stats()["blocks_in_use"] == 0)
    assert reader.stats.loaded == 10
    assert linker.stats.offloaded == 10


def test_what_went_to_the_store_is_told_with_the_load(store: StoreServer, link: Link, kit: Kit) -> None:
    linker = link(kit.mha())
    assert offload(linker, kit.transfer(keys("a", 4)))
    tree = SimpleNamespace(linker=SimpleNamespace(cache_linker=linker))
    stats = SimpleNamespace(full_evictable_size=8)
    inquirer = SimpleNamespace(
        pool_stats_observer=SimpleNamespace(tree_cache=tree, get_pool_stats=lambda: stats)
    )
    snapshot = kit.sg.reports.extend_load(kit.sg.load_snapshot.LoadSnapshot(), inquirer)
    load = msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot), type=SchedulerLoad)
    assert (load.num_cached_tokens, load.kvmesh_store) == (8, StoreTraffic(offloaded=4))
    tree.linker = None
    snapshot = kit.sg.reports.extend_load(kit.sg.load_snapshot.LoadSnapshot(), inquirer)
    assert snapshot.kvmesh_store is None


def test_a_layer_is_ready_before_the_next_is_copied(store: StoreServer, link: Link, kit: Kit) -> None:
    pool = kit.mha()
    linker = link(pool)
    assert offload(linker, kit.transfer(keys("a", 4)))
    pages = linker._pages
    assert pages is not None
    order: list[str] = []
    copy, complete = pages.load, linker._counter.complete

    def copying(lease: Any, ids: list[int], layer: int) -> None:
        order.append(f"copy {layer}")
        copy(lease, ids, layer)

    def completing(index: int, layer: int) -> None:
        order.append(f"ready {layer}")
        complete(index, layer)

    pages.load = copying
    linker._counter.complete = completing
    assert load(linker, kit.transfer(keys("a", 4), 20))
    assert order == [f"{what} {layer}" for layer in range(LAYERS) for what in ("copy", "ready")]


def test_without_a_store_nothing_is_found_and_nothing_fails(link: Link, kit: Kit) -> None:
    linker = link(kit.mha(), connect=False)
    chain = keys("a", 3)
    assert linker.lookup("r", kit.transfer(chain)) == []
    assert not linker.load("r", kit.transfer(chain))
    assert linker.start_layer_wise_loading() == -1
    assert linker.finish_layer_wise_loading(-1)
    assert not offload(linker, kit.transfer(chain))
    assert linker.stats.refused == 3


def test_a_store_that_comes_back_is_found_again(
    socket: str, tmp_path: Path, store: StoreServer, link: Link, kit: Kit
) -> None:
    linker = link(kit.mha())
    chain = keys("a", 3)
    assert offload(linker, kit.transfer(chain))
    store.stop()
    assert linker.lookup("r", kit.transfer(chain)) == []
    assert not offload(linker, kit.transfer(chain))
    again = StoreServer(socket, 4 << 20, str(tmp_path))
    try:
        eventually(lambda: offload(linker, kit.transfer(chain)))
        assert linker.lookup("r", kit.transfer(chain)) == [1, 2, 3]
    finally:
        again.stop()


def test_a_load_that_was_begun_survives_its_store(store: StoreServer, link: Link, kit: Kit) -> None:
    pool = kit.mha()
    linker = link(pool)
    chain = keys("a", 5)
    expected = rows(pool, 0, 5)
    assert offload(linker, kit.transfer(chain))
    assert linker.load("r", kit.transfer(chain, 40))
    store.stop()
    index = linker.start_layer_wise_loading()
    assert linker.finish_layer_wise_loading(index)
    assert kit.equal(rows(pool, 40, 5), expected)


def test_evicted_blocks_are_computed_instead(store: StoreServer, link: Link, kit: Kit) -> None:
    linker = link(kit.mha())
    chain = keys("a", 3)
    assert offload(linker, kit.transfer(chain))
    assert linker.lookup("r", kit.transfer(chain)) == [1, 2, 3]
    store.flush()
    assert not linker.load("r", kit.transfer(chain))


def test_a_cancelled_load_lets_its_blocks_go(store: StoreServer, link: Link, kit: Kit) -> None:
    linker = link(kit.mha())
    chain = keys("a", 3)
    assert offload(linker, kit.transfer(chain))
    assert linker.load("r", kit.transfer(chain))
    assert store.stats()["blocks_in_use"] == 3
    assert linker.cancel_queued_load("r")
    assert not linker.cancel_queued_load("r")
    eventually(lambda: store.stats()["blocks_in_use"] == 0)
    assert linker.start_layer_wise_loading() == -1


def test_a_failed_load_is_reported_after_the_forward_not_raised_into_it(
    store: StoreServer, link: Link, kit: Kit
) -> None:
    linker = link(kit.mha())
    chain = keys("a", 3)
    assert offload(linker, kit.transfer(chain))
    pages = linker._pages
    assert pages is not None

    def broken(lease: Any, ids: list[int], layer: int) -> None:
        if layer == 1:
            raise OSError("a broken copy")

    pages.load = broken
    assert not load(linker, kit.transfer(chain))
    assert linker.stats.failed_loads == 1
    eventually(lambda: store.stats()["blocks_in_use"] == 0)


def test_the_newest_offload_is_shed_when_the_copier_is_behind(
    store: StoreServer, link: Link, kit: Kit
) -> None:
    linker = link(kit.mha())
    pages = linker._pages
    assert pages is not None
    copy = pages.offload
    release = False

    def slow(*arguments: Any) -> bool:
        eventually(lambda: release)
        return copy(*arguments)

    pages.offload = slow
    chains = [keys(name, 12) for name in "abc"]
    for chain in chains:
        assert linker.offload(kit.transfer(chain))
    # A quarter of 65 pages: the first whatever its size, then none beyond 16.
    assert linker.stats.shed == 24
    assert linker.num_completed_offloads() == 0
    release = True
    eventually(lambda: linker.num_completed_offloads() == 3)
    assert [linker.pop_completed_offload() for _ in chains] == [True, False, False]
    assert [len(linker.lookup("r", kit.transfer(chain))) for chain in chains] == [12, 0, 0]


def test_reset_waits_for_copies_and_forgets_results(store: StoreServer, link: Link, kit: Kit) -> None:
    linker = link(kit.mha())
    assert linker.offload(kit.transfer(keys("a", 3)))
    linker.reset()
    assert linker.num_completed_offloads() == 0
    assert store.stats()["stored"] == 3
    assert load(linker, kit.transfer(keys("a", 3), 9))


def test_a_parent_is_told_to_the_store(store: StoreServer, link: Link, kit: Kit) -> None:
    linker = link(kit.mha())
    chain = keys("a", 4)
    assert offload(linker, kit.transfer(chain[:2]))
    linker.next_chain.parent = chain[1]
    assert offload(linker, kit.transfer(chain[2:], 2))
    assert linker.next_chain.parent is None
    numbers = [int(key[:16], 16) for key in chain]
    changes = store.drain_changes()
    assert changes == [("stored", None, numbers)]


def test_the_tenant_of_the_salt_is_told_to_the_store(
    socket: str, tmp_path: Path, link: Link, kit: Kit
) -> None:
    server = StoreServer(socket, 4 << 20, str(tmp_path), tenant_weights={"*": 1.0})
    try:
        linker = link(kit.mha())
        for name, salt in (("a", "tenant:acme/adapter:terse"), ("b", None)):
            core = SimpleNamespace(prefetch_anchor_info=lambda node_id, salt=salt: (None, salt))
            cache = SimpleNamespace(get_prefix_hash_values=lambda node_id: [], tree_core=core)
            wrapper = SimpleNamespace(cache=cache, cache_linker=linker)
            transfers = kit.transfer(keys(name, 2))
            kit.sg.linker._note_chain(wrapper, 7, transfers)
            assert offload(linker, transfers)
        held = server.tenant_bytes()
        assert set(held) == {"acme", ""}
        assert held["acme"] == held[""] > 0
    finally:
        server.stop()


@pytest.mark.parametrize("case", ["swa", "subclass"])
def test_what_cannot_be_stored_runs_without(
    case: str, caplog: pytest.LogCaptureFixture, store: StoreServer, link: Link, kit: Kit
) -> None:
    pool = kit.mha()
    if case == "subclass":
        pool.__class__ = kit.sg.memory_pool.MHATokenToKVPoolFP4
    components = {*kit.full, kit.sg.component_type.ComponentType.SWA} if case == "swa" else None
    linker = link(pool, components, connect=False)
    assert "running without the KV store" in caplog.text
    assert linker.lookup("r", kit.transfer(keys("a", 1))) == []
    assert not linker.offload(kit.transfer(keys("a", 1)))
    assert not linker.load("r", kit.transfer(keys("a", 1)))
    assert linker.start_layer_wise_loading() == -1
    linker.reset()


def test_numerics_and_shards_are_part_of_the_namespace(kit: Kit, store: StoreServer, link: Link) -> None:
    writer = link(kit.mha())
    chain = keys("a", 3)
    assert offload(writer, kit.transfer(chain))
    for change in ({"dtype": "float16"}, {"quantization": "fp8"}, {"json_model_override_args": '{"a": 1}'}):
        assert link(kit.mha(), server=change).lookup("r", kit.transfer(chain)) == []
    assert link(kit.mha(), shard={"pp_rank": 1, "pp_size": 2}).lookup("r", kit.transfer(chain)) == []
    assert link(kit.mha()).lookup("r", kit.transfer(chain)) == [1, 2, 3]
