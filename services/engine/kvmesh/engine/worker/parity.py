"""Whether an engine's blocks are named as the mesh names them, proven before the worker takes requests.

The router matches the hashes of a prompt with those in the engine's events. If the two are made differently
nothing fails, and nothing is ever found either. So a new engine computes two prompts of random tokens, one of
them under a salt, and what it says of them must be what `hash_tokens` says.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

from kvmesh.common.block_names import chain_seed
from kvmesh.common.errors import KvmeshError
from kvmesh.core import hash_tokens
from kvmesh.engine.contract import Engine, EngineInfo, KvEvent
from kvmesh.engine.worker.record import BlockRecord
from kvmesh.engine.worker.translation import named_events
from kvmesh.v1.errors_pb2 import ErrorCode

# Whole blocks of a prompt: a second one shows how the chain goes on.
BLOCKS = 3
# As tenants have theirs.
SALT = "tenant:rehearsal"
# Seconds for the events to come of what the engine has done.
TIMEOUT_S = 10.0
# Seconds between attempts to empty an engine that still counts the prompt as running.
_AGAIN_S = 0.05

# How a token id could be written into the bytes that are hashed, if not as we do it.
_OTHER_IDS = {"64-bit": "<{}q", "big-endian 32-bit": ">{}I", "big-endian 64-bit": ">{}q"}


async def prove_parity(engine: Engine, info: EngineInfo, page_size: int) -> None:
    """Return when the engine's hashes are ours and its cache is empty again.

    `page_size` is the mesh's, in tokens. Belongs before anybody else reads the engine's events or submits.
    Raises KvmeshError(ENGINE_FAILED) that names the difference.
    """
    if info.page_size != page_size:
        raise _refused(
            f"they have {info.page_size} tokens and those of this mesh {page_size}; set `engine.page_size` "
            f"to {info.page_size} everywhere, or start the engine with {page_size}"
        )
    async with aclosing(named_events(engine, info)) as events:
        record = BlockRecord()
        for salt in ("", SALT):
            await _rehearse(engine, info, events, record, salt)
        await _empty(engine)
        if not await _follow(events, record, lambda: not len(record)):
            raise _refused("the cache was emptied, but the events do not say so")


async def _rehearse(
    engine: Engine, info: EngineInfo, events: AsyncIterator[list[KvEvent]], record: BlockRecord, salt: str
) -> None:
    """Have a prompt computed under a salt, or none, and compare the blocks that it adds to the record."""
    # Random, so that no tier below has it: it would not be computed then.
    tokens = [random.randrange(info.vocab_size) for _ in range(BLOCKS * info.page_size)]
    before = len(record)
    await engine.cache_prompt(tokens, salt)
    kind = "salted prompt" if salt else "prompt"
    if not await _follow(events, record, lambda: len(record) >= before + BLOCKS):
        raise _refused(
            f"a {kind} of {BLOCKS} blocks led to events of {len(record) - before}"
            f"{_explain(tokens, salt, record)}"
        )
    if any(block not in record for block in hash_tokens(tokens, info.page_size, chain_seed(salt)).tolist()):
        raise _refused(f"a {kind}'s hashes are not those of its tokens{_explain(tokens, salt, record)}")


async def _follow(
    events: AsyncIterator[list[KvEvent]], record: BlockRecord, reached: Callable[[], bool]
) -> bool:
    """Record events until it is reached; False when that does not happen in time."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not reached():
                for event in await anext(events):
                    record.apply(event)
    except TimeoutError:
        return False
    return True


async def _empty(engine: Engine) -> None:
    """Flush, again and again while the engine says that the prompt runs; raises what it says at last."""
    deadline = asyncio.get_running_loop().time() + TIMEOUT_S
    while True:
        try:
            return await engine.flush_cache()
        except KvmeshError as error:
            late = asyncio.get_running_loop().time() > deadline
            if late or error.code != ErrorCode.ERROR_CODE_OVERLOADED:
                raise
            await asyncio.sleep(_AGAIN_S)


def _explain(tokens: Sequence[int], salt: str, record: BlockRecord) -> str:
    """What would explain the engine's hashes, as the end of a sentence."""
    own = len(tokens) // BLOCKS
    if salt:
        # All else the prompt without a salt has shown.
        bare = hash_tokens(tokens, own)[0] in record
        return (
            ": they are those of the prompt without its salt" if bare else ": they are salted in another way"
        )
    for size in (2**power for power in range(len(tokens).bit_length())):
        if size != own and size <= len(tokens) and _chain(tokens, size, "<{}I")[0] in record:
            return f": they are those of blocks of {size} tokens"
    for name, layout in _OTHER_IDS.items():
        if _chain(tokens, own, layout)[0] in record:
            return f": they are those of {name} token ids"
    return ": they are seeded or made in another way" if len(record) else ""


def _chain(tokens: Sequence[int], size: int, layout: str) -> list[int]:
    """Page hashes as kvmesh makes them, over other bytes; see `hash_tokens`."""
    hashes, parent = [], b""
    for start in range(0, len(tokens) - size + 1, size):
        page = struct.pack(layout.format(size), *tokens[start : start + size])
        parent = hashlib.sha256(parent + page).digest()
        hashes.append(int.from_bytes(parent[:8], "big"))
    return hashes


def _refused(difference: str) -> KvmeshError:
    return KvmeshError(
        ErrorCode.ERROR_CODE_ENGINE_FAILED, f"the engine's blocks are not this mesh's: {difference}"
    )
