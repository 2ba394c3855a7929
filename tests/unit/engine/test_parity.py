"""A worker proves that its engine names blocks as the mesh does, or is refused with the difference."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.nats import NatsServer
from kvmesh.common.block_names import chain_seed
from kvmesh.common.config import load_config
from kvmesh.common.errors import KvmeshError
from kvmesh.core import event_namespace_seed, hash_tokens
from kvmesh.decode.service import add_service
from kvmesh.engine.contract import BlocksCleared, BlocksRemoved, BlocksStored, EngineInfo, KvEvent, Role
from kvmesh.engine.mock import MockEngine
from kvmesh.engine.mock import engine as mock_module
from kvmesh.engine.mock.blocks import page_hashes
from kvmesh.engine.worker import WorkerProcess, parity
from kvmesh.engine.worker.parity import prove_parity
from kvmesh.engine.worker.translation import Translation
from kvmesh.v1.errors_pb2 import ErrorCode

Hashes = Callable[[Sequence[int], int, str], list[int]]


def chain(layout: str = "<{}I", seed: bytes = b"", size: int | None = None) -> Hashes:
    """Page hashes over other bytes than ours."""

    def hashes(tokens: Sequence[int], page_size: int, _salt: str) -> list[int]:
        length, parent, found = size or page_size, seed, []
        for start in range(0, len(tokens) - length + 1, length):
            page = struct.pack(layout.format(length), *tokens[start : start + length])
            parent = hashlib.sha256(parent + page).digest()
            found.append(int.from_bytes(parent[:8], "big"))
        return found

    return hashes


def other_salts(tokens: Sequence[int], page_size: int, salt: str) -> list[int]:
    """The salt alone seeds the chain, as in the events that SGLang publishes."""
    return hash_tokens(tokens, page_size, event_namespace_seed(salt or None)).tolist()


@pytest.fixture(params=[Role.AGGREGATED, Role.PREFILL, Role.DECODE])
async def started(request: pytest.FixtureRequest) -> AsyncIterator[tuple[MockEngine, EngineInfo]]:
    engine = MockEngine(load_config(), request.param, model_path="", worker_id="w")
    info = await engine.start()
    yield engine, info
    await engine.close()


async def test_our_hashes_are_accepted_and_nothing_is_left_behind(
    started: tuple[MockEngine, EngineInfo],
) -> None:
    engine, info = started
    await prove_parity(engine, info, 16)
    load = engine.load()
    assert (load.blocks_cached, load.blocks_used, load.requests) == (0, 0, 0)
    assert engine._events.empty()


@pytest.mark.parametrize(
    ("made", "difference"),
    [
        (chain(seed=b"\1" * 32), "seeded or made in another way"),
        (chain("<{}q"), "64-bit token ids"),
        (chain(">{}I"), "big-endian 32-bit token ids"),
        (chain(size=8), "blocks of 8 tokens"),
        (chain(size=32), "3 blocks led to events of 1: they are those of blocks of 32 tokens"),
        (lambda tokens, size, salt: [], "3 blocks led to events of 0"),
        (lambda tokens, size, salt: chain()(tokens, size, ""), "those of the prompt without its salt"),
        (other_salts, "a salted prompt's hashes .* salted in another way"),
        (lambda tokens, size, salt: [] if salt else chain()(tokens, size, ""), "salted prompt of 3 .* of 0"),
    ],
)
async def test_other_hashes_are_refused_with_the_difference(
    monkeypatch: pytest.MonkeyPatch, made: Hashes, difference: str
) -> None:
    monkeypatch.setattr(mock_module, "page_hashes", made)
    monkeypatch.setattr(parity, "TIMEOUT_S", 0.2)
    engine = MockEngine(load_config(), Role.AGGREGATED, model_path="", worker_id="w")
    info = await engine.start()
    try:
        with pytest.raises(KvmeshError, match=difference) as refused:
            await prove_parity(engine, info, 16)
        assert refused.value.code == ErrorCode.ERROR_CODE_ENGINE_FAILED
    finally:
        await engine.close()


@pytest.mark.parametrize(
    ("made", "page_size", "difference"),
    [
        (page_hashes, 32, "they have 32 tokens and those of this mesh 16"),
        (chain(seed=b"\1" * 32), 16, "seeded or made in another way"),
        (chain("<{}q"), 16, "64-bit token ids"),
    ],
)
async def test_a_worker_with_other_blocks_does_not_join(
    nats: NatsServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: Hashes,
    page_size: int,
    difference: str,
) -> None:
    monkeypatch.setattr(mock_module, "page_hashes", made)
    config = load_config(
        overrides={
            "engine": {"kind": "mock", "mock": {"page_size": page_size}},
            "nats": {"url": nats.url},
            "home": str(tmp_path),
        }
    )
    with pytest.raises(KvmeshError, match=difference):
        await WorkerProcess(config, Role.AGGREGATED, add_service).run()


class Foreign(MockEngine):
    """Names blocks by numbers of its own and tells their tokens, as other engines do."""

    names = itertools.count(1)

    async def start(self) -> EngineInfo:
        return replace(await super().start(), own_hashes=True)

    async def cache_prompt(self, token_ids: Sequence[int], cache_salt: str = "") -> None:
        self.tokens, self.salt = list(token_ids), cache_salt
        await super().cache_prompt(token_ids, cache_salt)

    async def kv_events(self) -> AsyncGenerator[list[KvEvent], None]:
        async for events in super().kv_events():
            yield [self.rename(event) for event in events]

    def rename(self, event: KvEvent) -> KvEvent:
        if isinstance(event, BlocksStored):
            return BlocksStored([next(self.names) for _ in event.hashes], None, self.tokens, self.salt)
        return event


async def test_an_engine_with_names_of_its_own_is_translated() -> None:
    engine = Foreign(load_config(), Role.AGGREGATED, model_path="", worker_id="w")
    info = await engine.start()
    try:
        await prove_parity(engine, info, 16)
    finally:
        await engine.close()


@pytest.mark.parametrize("salt", ["", "tenant:acme"])
def test_translation_follows_chains_and_removals(salt: str) -> None:
    tokens = list(range(100, 164))
    ours = hash_tokens(tokens, 16, chain_seed(salt)).tolist()
    translation = Translation(16)
    assert translation.translate([BlocksStored([1, 2], None, tokens[:32], salt)]) == [BlocksStored(ours[:2])]
    assert translation.translate([BlocksStored([3, 4], 2, tokens[32:])]) == [BlocksStored(ours[2:], ours[1])]
    assert translation.translate([BlocksRemoved([3, 77])]) == [BlocksRemoved([ours[2]])]
    # What it continues is not known, so it has no name here.
    assert translation.translate([BlocksStored([9], 3, tokens[:16])]) == []
    assert translation.translate([BlocksCleared()]) == [BlocksCleared()]
    assert translation.translate([BlocksStored([5], 4, tokens[:16])]) == []


def test_blocks_whose_salt_is_not_told_get_no_name() -> None:
    """Anybody's prompt of these tokens would be sent to where a tenant's are cached."""
    tokens = list(range(32))
    translation = Translation(16)
    assert translation.translate([BlocksStored([1], None, tokens[:16])]) == []
    assert translation.translate([BlocksStored([2], 1, tokens[16:], "")]) == []
    assert translation.translate([BlocksRemoved([1, 2])]) == [BlocksRemoved([])]


async def test_an_engine_that_tells_no_salts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Foreign, "rename", lambda self, event: replace(event, token_ids=self.tokens))
    monkeypatch.setattr(parity, "TIMEOUT_S", 0.2)
    engine = Foreign(load_config(), Role.AGGREGATED, model_path="", worker_id="w")
    info = await engine.start()
    try:
        with pytest.raises(KvmeshError, match="a prompt of 3 blocks led to events of 0"):
            await prove_parity(engine, info, 16)
    finally:
        await engine.close()


def test_tokens_that_do_not_fit_their_blocks_are_refused() -> None:
    with pytest.raises(KvmeshError, match="2 blocks with 16 tokens, where a block has 16"):
        Translation(16).translate([BlocksStored([1, 2], None, list(range(16)), "")])
