"""kvmesh's Rust data plane: block hashes, the prefix index, placement, the KV store and text."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

# A list of ints, or a one-dimensional array or buffer of 64-bit integers. Negative ones are read in two's
# complement.
_Hashes: TypeAlias = Sequence[int] | NDArray[np.uint64] | NDArray[np.int64]

# A list of ints, or a one-dimensional array or buffer of 32- or 64-bit integers.
_Tokens: TypeAlias = (
    Sequence[int] | NDArray[np.uint32] | NDArray[np.int32] | NDArray[np.uint64] | NDArray[np.int64]
)

# A contiguous buffer of unsigned bytes.
_Bytes: TypeAlias = Buffer | NDArray[np.uint8]

class IndexStats(TypedDict):
    """Sizes of a PrefixIndex at one moment."""

    # Engines and stores; of these, engines.
    holders: int
    engines: int
    # Distinct blocks; (holder, tier, block) triples; runs the blocks lie in.
    blocks: int
    held: int
    runs: int
    # Bytes used, and the cap on them.
    bytes: int
    max_bytes: int | None
    # Blocks forgotten at the cap since the start, each counted once, whoever held it.
    forgotten: int

def hash_tokens(tokens: _Tokens, page_size: int, namespace: bytes = b"") -> NDArray[np.uint64]:
    """The 64-bit hashes of every whole page of a prompt, SGLang's page hash chain.

    `tokens` are ids in [0, 2**32), `page_size` is in tokens; tokens after the last whole page are
    ignored. `namespace` is the digest of 32 bytes that seeds the first page (see
    `event_namespace_seed`), or empty.

    Releases the GIL. Raises ValueError for a token out of range, a page_size below 1 or a namespace
    of another length, TypeError for tokens that are not integers.
    """

def largest_token(tokens: _Tokens) -> int:
    """The largest of token ids; 0 of none."""

def packed_field(field: int, tokens: _Tokens) -> bytes:
    """A protobuf field `repeated uint32` of this number, packed: fit to be put behind a serialized message
    without it. `tokens` as for `hash_tokens`; raises as that does."""

def read_steps(message: bytes) -> list[tuple[int, list[int], bytes | None]]:
    """The steps of a serialized `GenerateResponse` or `PrefillResponse`: the request's id, its new tokens, and the
    serialized `RequestStep` where it says more than these, else None.

    Raises ValueError for what is no such message.
    """

_PlainRequest: TypeAlias = tuple[str, list[tuple[bytes, bytes]], dict[str, Any], bytes | None]

def read_plain_request(data: bytes, max_header_bytes: int, max_body_bytes: int) -> _PlainRequest | int | None:
    """What an HTTP client sent since its last request.

    A plain one, to an endpoint that generates, of fields that say how tokens are chosen and no more: its path, its
    headers with names in small letters, its fields by name, those that are null left out, and a completion's prompt
    of token ids as the bytes of an array of 32-bit integers, which then is not among the fields. The beginning of
    what may be one: the number of bytes that it lacks. Anything else, and what is out of bounds: None; then nothing
    is known of it, and no error either.
    """

class HashChain:
    """The hashes of a conversation that grows: each token is hashed once.

    `page_size` and `namespace` are as for `hash_tokens`. Not to be extended by two threads at once:
    the second one waits.
    """

    def __new__(cls, page_size: int, namespace: bytes = b"") -> HashChain: ...
    def extend(self, tokens: _Tokens) -> NDArray[np.uint64]:
        """Append tokens; returns the hashes of the pages they completed. The tokens of a page that is not
        whole yet are kept. Releases the GIL. Raises as `hash_tokens` does, and then appends nothing."""

    def __len__(self) -> int:
        """Tokens so far."""

def namespace_seed(extra_key: str | None = None, cache_salt: str | None = None) -> bytes:
    """The seed of storage keys (KVBM's digests) for a LoRA adapter and a cache salt: 32 bytes, or
    empty without either. An empty string is not the same as None."""

def event_namespace_seed(cache_salt: str | None = None) -> bytes:
    """The seed of the hashes in an engine's KV events for a cache salt: 32 bytes, or empty without
    one. SGLang seeds its events and its storage keys differently; see `namespace_seed`."""

class PrefixIndex:
    """Which holder (engine or store) has which block of KV, in which tier.

    An engine has a device tier; a store with a node has that node's host and nvme tiers and a
    network tier; a store without one has a network tier. An engine sees its own device, its node's
    host and nvme, and every network tier. Membership of (holder, tier, hash) alone decides a match.

    `max_bytes` caps the index's memory: at the cap the least recently matched blocks are forgotten
    and counted, so it may report too little, never too much. None for no cap.

    Tiers are "device", "host", "nvme", "network"; another name raises ValueError. Thread-safe; every
    method releases the GIL. Methods that take an id raise KeyError once that holder was dropped.
    """

    def __new__(cls, max_bytes: int | None = None) -> PrefixIndex: ...
    def add_engine(self, name: str, node: str | None = None) -> int:
        """Add an engine, on a node whose stores it sees. Returns its id. Raises ValueError when the
        name is in use or 4,096 holders are there."""

    def add_store(self, name: str, node: str | None = None) -> int:
        """Add a store, on a node, or without one for the network tier. Returns its id. Raises
        ValueError when the name is in use or 4,096 holders are there."""

    def store(self, id: int, hashes: _Hashes, parent: int | None = None, tier: str = "device") -> None:
        """Record that a holder has these blocks in a tier. `parent`, the block before the first, is
        a hint for compression. Raises ValueError for a tier that such a holder does not have."""

    def remove(self, id: int, hashes: _Hashes, tier: str = "device") -> None:
        """Record that a holder no longer has these blocks in a tier. Unknown ones are ignored."""

    def clear(self, id: int, tier: str | None = None) -> None:
        """Record that a holder has nothing in a tier, or in any tier (None)."""

    def drop(self, id: int) -> None:
        """Forget a holder, its blocks and its id."""

    def match(self, hashes: _Hashes) -> dict[int, tuple[int, int, int, int]]:
        """Engines that see the first block of a prompt: {engine id: (device, host, nvme, network)}.

        The four depths count leading blocks, each of which the engine sees on its device; on device
        or host; on device, host or nvme; in any tier. `hashes` are the prompt's blocks from its start.
        """

    def match_into(self, hashes: _Hashes, engines: NDArray[np.uint32], depths: NDArray[np.uint32]) -> int:
        """As `match`, into arrays of the caller's: fills the first n rows of `engines` (1-D, ids) and
        `depths` (rows of 4) and returns n. Only `hashes` are copied. Raises ValueError when more engines
        were found than there are rows (`stats()["engines"]` are always enough)."""

    def apply(self, batch: bytes) -> None:
        """Apply one serialized `kvmesh.v1.KvEventBatch` to the holder it names, in order, whole or not at
        all. Its sequence number is the caller's business; changes in tiers that the holder cannot have
        are skipped. Raises ValueError for bytes that are no batch or whose columns do not add up,
        KeyError for a holder that was not added."""

    def snapshot(self) -> bytes:
        """The whole state, holders and their ids included, at one moment. Writers wait meanwhile."""

    @staticmethod
    def restore(bytes: bytes, max_bytes: int | None = None) -> PrefixIndex:
        """An index with what `snapshot` wrote, every holder under its id; what does not fit under
        `max_bytes` is forgotten. Raises ValueError for bytes that are damaged or of another version."""

    def forgotten(self, id: int, tier: str = "device") -> int:
        """Blocks of a holder in a tier that were forgotten at the cap since it was last cleared: at most so many that
        it has are not in the index. One that was forgotten twice counts twice."""

    def digest(self, id: int, tier: str = "device") -> tuple[int, int]:
        """(count, sum modulo 2**128) over the blocks the index knows a holder to have in a tier.
        Equal sets have equal digests, whatever the order in which they came to be."""

    def blocks(self, id: int, tier: str = "device") -> NDArray[np.uint64]:
        """The blocks the index knows a holder to have in a tier, in no order to rely on; blocks stored as
        one chain mostly lie together. Reads the whole index."""

    def stats(self) -> IndexStats:
        """Sizes now."""

# Names of the terms of a placement's cost, which are milliseconds.
TERMS: list[str]
# Names of the policies that are built in.
POLICIES: list[str]

_Tiers: TypeAlias = tuple[int, int, int, int]
_Terms: TypeAlias = tuple[float, float, float, float, float, float, float, float]

# What may be asked to judge: request (prompt tokens, session, tenant, priority); candidates (prefill, decode, live
# requests there, cached tokens by tier, terms); whether these are decode workers alone. Returns a cost each.
Judge: TypeAlias = Callable[
    [tuple[int, int, int, int], list[tuple[int, int, int, _Tiers, _Terms]], bool], list[float]
]

class Placed:
    """A placement that was made; an aggregated worker is both `prefill` and `decode`. Times in milliseconds."""

    @property
    def request(self) -> int:
        """The number it was submitted with."""

    @property
    def lease(self) -> int:
        """Random; 0 only of what was selected and not placed."""

    @property
    def prefill(self) -> int: ...
    @property
    def decode(self) -> int: ...
    @property
    def policy(self) -> str:
        """The one that chose."""

    @property
    def cached(self) -> _Tiers:
        """Prompt tokens cached where it is computed: device, host, nvme, network, each without faster tiers."""

    @property
    def terms(self) -> _Terms:
        """Predicted costs, in the order of `TERMS`."""

    @property
    def ttft_ms(self) -> float:
        """Predicted time to the first token."""

    @property
    def held_ms(self) -> float: ...
    def candidates(self) -> list[tuple[int, int, _Tiers, float, _Terms]]:
        """What it was chosen from, the cheapest first: all if the request asked, else the Selector's `explained`, the
        winner in any case: (prefill, decode, cached, the policy's cost, terms)."""

    def shadows(self) -> list[tuple[str, int, int, float, float, float, float]]:
        """What policies that look on would have chosen: (policy, prefill, decode, its cost, its time to the first token, and
        both of the placement that was made, as that policy saw it)."""

class Refused:
    """A request that will not be placed. Times in milliseconds."""

    @property
    def request(self) -> int: ...
    @property
    def retry_after_ms(self) -> float: ...
    @property
    def reason(self) -> str:
        """full, waited, deadline or no-worker."""

    @property
    def held_ms(self) -> float: ...

_Outcomes: TypeAlias = list[Placed | Refused]

class Selector:
    """Places the requests of one model. Times are milliseconds from 0 on that never fall; workers, requests and leases
    are ints. The same calls with the same seed bring about the same placements.

    Calls must not overlap, whatever threads they come from. A call takes microseconds and keeps the GIL. What it
    placed or refused, of requests held before too, it returns.
    """

    def __new__(
        cls,
        index: PrefixIndex,
        *,
        block_tokens: int,
        seed: int,
        policy: str = "kv",
        temperature: float = 0.0,
        joint: bool = True,
        gather_ms: float | None = None,
        lease_ttl_ms: float = 30_000.0,
        explained: int = 0,
        max_held: int | None = None,
        max_wait_ms: float | None = None,
        weights: dict[int, float] | None = None,
    ) -> Selector:
        """`gather_ms` is how long `kv` waits for others after a first request, so that a burst is planned as one;
        without `joint` it never holds any. `explained` is how many candidates placements carry at most. `weights` are shares by hash of tenant. Raises ValueError for an
        unknown policy."""

    def add_worker(
        self,
        key: int,
        role: str,
        *,
        hardware_class: str,
        blocks: int,
        pass_tokens: int,
        pool: int = 0,
        prefill: Sequence[tuple[int, int, float]] = ...,
        decode: Sequence[tuple[int, float, float]] = ...,
        transfer: Sequence[tuple[int, float]] = ...,
        offers: Sequence[int] = ...,
        name: str = "",
        now: float = 0.0,
    ) -> int:
        """Add a worker; returns its id. `name` is what logs call it; `key` is stable across restarts; `role` is aggregated, prefill or decode;
        workers of one `hardware_class` are expected to be equally fast; prefill and decode workers of one
        `pool` are paired. `prefill`, `decode` and `transfer` are what it measured of itself: (tokens, tokens before
        them, ms), (streams, share of the pool in use, ms between tokens), (tokens, ms); `offers` are hashes of what
        it can do that not every worker can. Raises ValueError for another role."""

    def remove_worker(self, worker: int, *, now: float = 0.0) -> None:
        """Forget a worker and its link. Leases on it live on, without weight."""

    def link(self, worker: int, holder: int) -> None:
        """Say which engine of the index a worker is; an earlier link ends."""

    def submit(
        self,
        now: float,
        request: int,
        *,
        prompt_tokens: int,
        blocks: _Hashes,
        session: int = 0,
        tenant: int = 0,
        priority: int = 0,
        deadline: float | None = None,
        exclude: Sequence[int] = ...,
        needs: Sequence[int] = ...,
        policy: str | None = None,
        explain: bool = False,
        name: str = "",
    ) -> _Outcomes:
        """Place a request, or hold it. `request` is unique among those placed or held; `blocks` are the hashes of the
        prompt's whole blocks; `session` and `tenant` are hashes of names, 0 for none; `deadline` is when its first
        token must be there; `needs` are what its workers must offer; `name` is what logs call the request. Raises LookupError when no worker can take it, ValueError for an unknown policy."""

    def select(
        self,
        now: float,
        *,
        prompt_tokens: int,
        blocks: _Hashes,
        session: int = 0,
        tenant: int = 0,
        priority: int = 0,
        exclude: Sequence[int] = ...,
        needs: Sequence[int] = ...,
        policy: str | None = None,
    ) -> Placed:
        """The placement that a request would have, were it made now, as of `submit`; its lease is 0, and nothing is kept
        of it. Nothing waits. Raises LookupError when no worker can take it, ValueError for an unknown policy."""

    def withdraw(self, request: int, *, now: float = 0.0) -> bool:
        """Take a request back that is held; False when it is not held any more."""

    def adopt(
        self,
        now: float,
        lease: int,
        *,
        prefill: int,
        decode: int,
        prompt_tokens: int,
        cached: _Tiers,
        blocks: _Hashes,
        prefilled: bool = False,
        output_tokens: int = 0,
    ) -> bool:
        """Take over a lease that another replica gave out, as if it had been placed here now; False when it is held already.
        `cached` are prompt tokens by tier; `blocks` the prompt's hashes, as long as it is not computed. A worker that is
        not there any more is not weighed."""

    def report(
        self, now: float, reports: Sequence[tuple[int, bool, int, float, bool]]
    ) -> tuple[_Outcomes, list[int]]:
        """Account for how leases fare, and renew them: (lease, whether its prompt is computed, tokens generated,
        milliseconds of the time until its prompt was reported that went into moving its KV or 0, whether it ended).
        What they free is given out once, with all of it known. Also returns those that are not held."""

    def end(self, now: float, lease: int) -> _Outcomes | None:
        """End a lease. None for one that is not held."""

    def tick(self, now: float) -> tuple[_Outcomes, list[int]]:
        """Do what is due: at `wakes_at`, and about once a second. Also returns the leases that expired."""

    def wakes_at(self, now: float) -> float | None:
        """When `tick` is due, should nothing happen before; None when no request is held."""

    def apply(self, now: float, batch: bytes) -> None:
        """As `PrefixIndex.apply`, and takes note of what linked workers have on their devices."""

    def cleared(self, worker: int, *, now: float = 0.0) -> None:
        """A worker's device has nothing, or nothing is known of it."""

    def add_policy(self, name: str, judge: Judge, *, now: float = 0.0) -> None:
        """Add a policy of the caller's. What `judge` returns that is not a finite cost each is as if `kv` had
        judged. A pair's decode worker is chosen first, then the prefill worker with it."""

    def set(
        self,
        now: float,
        *,
        by: str = "",
        policy: str | None = None,
        temperature: float | None = None,
        max_held: int | None = None,
        max_wait_ms: float | None = None,
        shadows: Sequence[str] | None = None,
    ) -> _Outcomes:
        """Change what holds for requests from now on; what is None stays. `by` is who asked, for the log; `shadows` are
        policies that look on. Returns what that refused. Raises ValueError for an unknown policy, changing nothing."""

    @property
    def policy(self) -> str:
        """Of requests that name none."""

    @property
    def temperature(self) -> float:
        """0: the lowest cost wins; more softens the choice."""

    def open_log(
        self,
        directory: str | os.PathLike[str],
        *,
        model: str,
        run: str,
        epoch: float,
        max_bytes: int,
        max_files: int,
        max_queued: int = ...,
    ) -> None:
        """Write every call from now on to files in a directory, which is this router's alone. `model` and `run`, a life of
        the router, are said in them; `epoch` is the time 0 in seconds; a file of `max_bytes` is followed by another, and
        `max_files` are kept. Calls never wait for the disk. Raises OSError where the directory cannot be used."""

    def close_log(self) -> None:
        """Write what is queued, and nothing more; waits for the disk."""

    def log_stats(self) -> tuple[int, int, int, int, str | None] | None:
        """What became of the log: lines written, lines dropped, bytes, files begun, the last failure. None without one."""

    def slots(self, worker: int) -> tuple[int, int, int, int]:
        """What live leases take of a worker: requests, of them streaming, prompt tokens queued, blocks."""

    def pace(self, worker: int) -> tuple[float, int, float] | None:
        """The factor by which a worker is slower than its class, as far as that is believed, observations, and its
        mean relative error of late; None for an unknown one."""

    def links(self, worker: int) -> list[tuple[int, float, int, float]]:
        """The links by which a decode worker has received KV: (prefill worker, factor by which transfers take longer
        there, as far as it is believed, observations, mean relative error of late)."""

    def rates(self) -> list[tuple[str, int, list[tuple[str, list[tuple[str, float]], int, float]]]]:
        """What was learned: (hardware class, workers now, laws); a law is (name, [(coefficient, ms)], observations,
        mean relative error of late)."""

    def errors(self) -> tuple[int, float, float, float]:
        """How far predicted times to a computed prompt were off: (prompts, sum of actual minus predicted ms, sum of
        its absolute values, sum of actual ms)."""

    @property
    def leases(self) -> int:
        """Live ones."""

    @property
    def expired(self) -> int:
        """Leases that ended by expiry."""

    @property
    def held(self) -> int:
        """Requests held."""

    @property
    def leaked(self) -> int:
        """Requests that workers' slots count and no live lease stands for; 0 unless one did not free what it took."""

    @property
    def speculated(self) -> tuple[int, int]:
        """Blocks that count as cached although no event said so yet, and the sum of their hashes modulo 2^64."""

def replay(
    path: str | os.PathLike[str],
    *,
    policy: str | None = None,
    rates: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> str:
    """Make the decisions of a log again: of a file, or of every log in a directory. `policy` is asked at every decision
    what it would have chosen; with `rates`, {hardware class: {law: {coefficient: ms}}}, what it would have been by these.
    Returns JSON, a report for each model. Raises OSError, or ValueError for what is no log, or no policy of kvmesh's own."""

def page_digests(tokens: _Tokens, page_size: int, parent: bytes = b"") -> bytes:
    """The whole digests, 32 bytes each, whose first 64 bits `hash_tokens` gives; `parent` is the digest before
    the first page (a page's, or a seed), or empty."""

class CorruptBlockError(Exception):
    """A block's bytes are not those that were stored; the store drops it."""

class StoreStats(TypedDict):
    """A tier's gauges of this moment, and totals since its start."""

    capacity_bytes: int
    used_bytes: int
    blocks: int
    # Blocks being read or written.
    blocks_in_use: int
    stored: int
    loaded: int
    # Their bytes, with their headers.
    stored_bytes: int
    loaded_bytes: int
    # Look-ups for reading and for storing whose request had said something of its return.
    hinted: int
    # Blocks that left, by reason: "room" for another, "layout" (blocks of another size came there), "asked".
    evicted: dict[str, int]
    # Blocks asked for; of these, found.
    lookups: int
    hits: int
    # Blocks dropped because their checksum did not match.
    corrupt: int

class ObjectOptions(TypedDict):
    """Object storage, and what may be in it."""

    # `s3://bucket/prefix` or `fs:///path`; what is below it is kvmesh's alone
    url: str
    # of all stores together; those written longest ago are deleted beyond
    bytes: int
    # of S3, where it is not Amazon's
    endpoint: str | None
    region: str | None
    # key, secret and perhaps a token; None: what the environment, files or the machine's role give
    credentials: tuple[str, str, str | None] | None
    # for one call
    timeout_s: float
    # from one listing to the next
    refresh_s: float

class StoreObjects(TypedDict):
    """To and from object storage, in blocks since the start."""

    written: int
    # to be written now
    waiting: int
    # not written: "shed", "left", "unplaced", "failed"
    skipped: dict[str, int]
    recalled: int
    recalled_bytes: int
    # as measured last
    bytes_per_s: int
    # wanted and not had: "absent", "late", "slow", "full", "corrupt", "failed", "shed"
    missed: dict[str, int]
    # why the tier is out
    problem: str | None
    url: str
    outages: int
    # blocks it had when it came online last
    recovered: int
    written_bytes: int
    read_bytes: int

class StoreFlow(TypedDict):
    """What went between the host tier and the nvme tier, in blocks since the start, and the disk's state."""

    spilled: int
    # Left the host tier unwritten: the writer was behind; unlikely to return; too many bytes that day; no room.
    shed: int
    unlikely: int
    over_budget: int
    unplaced: int
    # To be written, or to be passed over, before memory has room again for what comes next.
    waiting: int
    promoted: int
    # Not read back: the disk failed, or the block was corrupt.
    failed: int
    # To be read back now.
    coming: int
    # Of prefetches given up because their time was over before they were begun.
    late: int
    # Times the tier was taken out, and the blocks it had when it came online last.
    outages: int
    recovered: int
    written_bytes: int
    read_bytes: int
    # Why the tier is out now.
    problem: str | None
    # How bytes are moved, e.g. "io_uring, direct".
    io: str

class StoreScrubbed(TypedDict):
    """What the passes over a tier at rest came to, since the start."""

    blocks: int
    bytes: int
    # Blocks dropped, copies of those that were bad in another tier included.
    corrupt: int
    # Passes that saw all of the tier.
    passes: int

# A namespace (model, revision, dtype, layout), its (rank, ranks), and the tiers of each block asked for, from the top.
StoreLocated: TypeAlias = tuple[tuple[str, str, str, str], tuple[int, int], list[list[str]]]

# Blocks, bytes, the bad ones (their tier and name in hexadecimal), and where to go on; None: that was all.
StoreChecked: TypeAlias = tuple[int, int, list[tuple[str, str]], int | None]

# Of a request: its session, whether one that continues it will come, whether it ends in a tool call, and in how many
# seconds it will come.
StoreHints: TypeAlias = tuple[int | None, bool | None, bool, float | None]

# ("stored", the 64-bit hash of the block before the first or None, hashes, each the parent of the next),
# ("removed", None, hashes), or ("lost", None, []): more changed than was kept, only a snapshot tells.
StoreChange: TypeAlias = tuple[str, int | None, list[int]]

# (model, revision, dtype, layout), (rank, ranks), and the bytes of each segment of a block.
StoreNamespace: TypeAlias = tuple[tuple[str, str, str, str], tuple[int, int], list[int]]

# Number, namespace, the digest of the block before the first, if it is known, digests, and seconds that are left.
StoreWanted: TypeAlias = tuple[int, StoreNamespace, bytes, bytes, float]

class Lent:
    """Blocks that another store may read in the arena, until `release` or the object's end."""

    @property
    def digests(self) -> bytes:
        """32 bytes each, in chain order; empty when released."""

    @property
    def offsets(self) -> list[int]:
        """Where each lies in the arena."""

    @property
    def slot_bytes(self) -> int: ...
    def doubt(self, places: list[int]) -> int:
        """A reader found these wrong: drop those that are wrong here; how many."""

    def release(self) -> None:
        """Idempotent."""

class Incoming:
    """Slots of blocks on their way from another store. What has not arrived by `release` will not come."""

    @property
    def places(self) -> list[int]:
        """Of the chain that was expected, which blocks are awaited."""

    @property
    def offsets(self) -> list[int]:
        """Where each goes in the arena. Its first `FIRST_WORD` bytes are not to be written."""

    @property
    def slot_bytes(self) -> int: ...
    def give_up(self) -> None:
        """Tell engines that wait to go on; the slots stay taken."""

    def release(self) -> None:
        """Free the slots, into which nothing may be written any more. Idempotent."""

# Bytes at a slot's start that are not moved between stores.
FIRST_WORD: int

class Warming:
    """Blocks that are to come up, as `StoreServer.warming` chose them."""

    @property
    def left(self) -> int:
        """Blocks that would not fit."""

class StoreServer:
    """The store of a node: tiers in shared memory, perhaps on a disk and in object storage, served on a unix socket by
    its own threads.

    Thread-safe; every method releases the GIL. `tier` is "host", "nvme" or "network", which is object storage;
    ValueError where there is none such.
    """

    def __new__(
        cls,
        socket: str,
        host_bytes: int,
        shm_dir: str,
        policy: str = "default",
        *,
        tenant_weights: dict[str, float] | None = None,
        nvme_path: str | None = None,
        nvme_bytes: int = 0,
        nvme_bytes_per_day: int | None = None,
        objects: ObjectOptions | None = None,
        pin_bytes: int | None = None,
        scrub_bytes_per_s: int | None = None,
        scrub_pause_s: float = 60.0,
    ) -> StoreServer:
        """Allocates the host tier (about half a second a GiB), reads the disk tier's record, and listens.

        `policy` says which blocks leave a full tier: `default`, `class-index`, `lru`, `gdsf`, `s3-fifo`.
        `tenant_weights` gives tenants shares of the host tier: `*` is each that is not named, 1 if absent.
        `nvme_bytes_per_day` bounds what is written to the disk; `pin_bytes` is each tenant's budget, a quarter
        of the host tier if None; `scrub_bytes_per_s` is how fast blocks at rest are checked, if they are, and
        `scrub_pause_s` the time between two passes. Raises OSError that says what to change: no space, the socket is taken;
        ValueError when its path is too long or there is no such policy. A disk or service that fails raises nothing:
        `flow` and `objects` tell."""

    @property
    def tiers(self) -> list[str]:
        """From the top."""

    def stats(self, tier: str = "host") -> StoreStats: ...
    def tenant_bytes(self) -> dict[str, int]:
        """What each tenant holds of the host tier, nobody under no name; empty where tenants have no shares."""

    def flow(self) -> StoreFlow | None:
        """None without an nvme tier."""

    def objects(self) -> StoreObjects | None:
        """None without object storage."""

    def latencies(self) -> list[tuple[str, str, list[tuple[float, int]], float]]:
        """How long operations took, since the start: the tier, the operation ("load" by an engine from memory, "read",
        "write"), how many took at most each bound in seconds and more than the one before, and all their seconds."""

    def scrubbed(self) -> dict[str, StoreScrubbed]:
        """By tier; empty where nothing is scrubbed."""

    @property
    def engines(self) -> int:
        """Engine processes connected now."""

    def flush(self, tier: str | None = None) -> int:
        """Forget every block of the tier, or of all that are this node's alone, that is not in use; how many."""

    def persist(self, within_s: float | None = None) -> None:
        """Write the host tier's blocks to the disk and to object storage, or as many as can be in a time; blocks.
        OSError: one of them is out. ValueError: not all were written."""

    def hint(self, model: str, hashes: list[int], hints: StoreHints) -> None:
        """What requests that use these blocks of a model (all: empty) from now on say of their return. Blocks are
        named by the first 64 bits of their digests."""

    def pin(self, tenant: str, model: str, digests: bytes, ttl_s: float) -> tuple[int, int, int]:
        """Keep the leading blocks of a chain in the host tier; returns receipt, blocks, and bytes of the budget.

        LookupError: none is there. ValueError: the tenant's budget does not suffice."""

    def unpin(self, receipt: int) -> bool:
        """End a pin; whether there was one."""

    @property
    def pinned(self) -> tuple[int, int]:
        """Pins and their bytes."""

    def prefetch(self, model: str, digests: bytes, hashes: list[int], within_s: float) -> tuple[int, int]:
        """Begin to read the leading blocks of a chain, named by digests or by 64-bit hashes, into the host tier.

        Engines come first; what has not begun within the time is given up. Returns, over the model's namespaces
        (all: empty), the leading blocks that are there and those behind them that are to come."""

    def recall(self, model: str, hashes: list[int], within_s: float) -> None:
        """Begin to read what memory and disk lack of a chain from object storage, which is asked for blocks not known."""

    def evict(self, tier: str, model: str, digests: bytes) -> int:
        """Drop blocks of a tier that are not in use; how many. All models: empty."""

    def locate(self, model: str, digests: bytes) -> list[StoreLocated]:
        """Where blocks are, for each namespace of a model (all: empty). Counts as no look-up."""

    def check(self, tier: str, after: int | None = None, limit: int = 64) -> StoreChecked:
        """Read some of a tier's blocks for their checksums and drop bad ones, with bad copies in other tiers; blocks.

        OSError: the tier is out, or goes out."""

    def warming(self, model: str, objects: ObjectOptions | None = None) -> Warming:
        """Choose blocks of the disk, or of an object storage that is read for this once, for the host tier's vacant room:
        those used last. All models: empty. Blocks. OSError: the storage is not to be had; ValueError: no such URL."""

    def hottest(self, model: str, limit: int) -> list[tuple[StoreNamespace, bytes, bytes]]:
        """Blocks of memory and disk as runs of chains, those used last first: namespace, the digest of the block before
        the first, if any, and the digests. At most so many blocks."""

    def open(self, namespace: StoreNamespace) -> None:
        """Get ready for a namespace's blocks. ValueError: they do not fit."""

    def room(self, namespace: StoreNamespace) -> int:
        """Blocks of a namespace that fit into vacant memory. ValueError: no such namespace."""

    def warm(self, warming: Warming, blocks: int) -> tuple[int, int, int]:
        """Bring about so many of them; how many came, did not, and are left of those chosen. Blocks."""

    @property
    def arena(self) -> tuple[int, int]:
        """Address and bytes of the host tier in this process, while the store lives."""

    @property
    def huge_bytes(self) -> int:
        """Bytes of the host tier that are in huge pages. Takes longer the larger the tier is."""

    def namespaces(self, model: str) -> list[StoreNamespace]:
        """The namespaces of a model (all: empty)."""

    def known(self, namespace: StoreNamespace, hashes: list[int]) -> bytes:
        """Digests of the leading blocks of a chain that are in some tier or on their way there."""

    def lend(self, namespace: StoreNamespace, digests: bytes) -> Lent | None:
        """Keep the leading blocks of a chain where another store can read them; blocks while the disk is read.
        None: no such namespace."""

    def expect(self, namespace: StoreNamespace, parent: bytes, digests: bytes) -> Incoming:
        """Reserve room for those blocks of a chain that are not here; `parent` is the digest before the first, if any.
        ValueError: no such namespace."""

    def arrived(self, incoming: Incoming) -> list[int]:
        """All bytes are in their slots: make whole blocks readable; the places of the others, which are dropped."""

    def look_elsewhere(self, neighbours: PrefixIndex) -> None:
        """From now on engines' look-ups ask this index, too, and what others have is told by `wanted`. Each of the other
        nodes has a store and an engine in it. Once."""

    def wanted(self, timeout_s: float) -> list[StoreWanted]:
        """Wait for blocks that engines ask for and others have; [] after the time. `settle` each."""

    def settle(self, number: int) -> None:
        """No more of these blocks will come: engines that wait for them go on."""

    @property
    def wanted_total(self) -> tuple[int, int]:
        """Blocks told by `wanted`, and not told because too many were under way."""

    def bring(self, namespace: StoreNamespace, parent: bytes, digests: bytes, within_s: float) -> None:
        """Read what memory and disk lack of a chain out of object storage; blocks. ValueError: no such namespace."""

    def wait_changes(self, timeout_s: float, tier: str = "host") -> bool:
        """Block until there are changes to drain, or the time is over, or `wake`; whether there are."""

    def wake(self) -> None:
        """Make `wait_changes` of every tier return."""

    def drain_changes(self, tier: str = "host") -> list[StoreChange]:
        """The changes since the last drain or snapshot, in order."""

    def snapshot(self, tier: str = "host") -> tuple[list[StoreChange], list[StoreChange]]:
        """The changes not drained yet, and the whole content after them as "stored" changes."""

    def stop(self) -> None:
        """Disconnect every engine, stop listening, let go of the disk; idempotent."""

class TieredStore:
    """The tiers of a store within one process: blocks of `block_bytes` by digest (32 bytes), one by one.

    Thread-safe; every method releases the GIL. Blocks are checked whenever they cross from one tier to another or
    to the caller; a bad copy is dropped, counted, and never returned. Also a context manager.
    """

    def __new__(
        cls,
        host_bytes: int,
        block_bytes: int,
        nvme_path: str | os.PathLike[str] | None = None,
        nvme_bytes: int = 0,
        remote: str | ObjectOptions | None = None,
        policy: str = "default",
        *,
        shm_dir: str | os.PathLike[str] = ...,
        nvme_bytes_per_day: int | None = None,
    ) -> TieredStore:
        """`nvme_path` is a directory of this store alone; what it holds is there again after a restart, if
        `block_bytes` is the same and `nvme_bytes` of about the same size.
        `remote` is object storage that other stores may share: `s3://bucket/prefix`, with the credentials and region of
        the environment, or `fs:///path`; or all there is to say of it.
        OSError, ValueError that say what to change. A disk or service that fails raises nothing: `stats` tells."""

    def put(self, digest: bytes, data: _Bytes) -> bool:
        """Store a block; whether it is there now: False when all others are in use, or are worth more.

        Blocks for the copy, and while others that leave for it are being written to the disk."""

    def get(self, digest: bytes, out: _Bytes) -> str | None:
        """Copy a block to `out`; the tier it was in ("host", "nvme", "network"), or None. One from below is in the
        host tier afterwards. Blocks for the copy, the disk and the service. After None `out` may hold anything."""

    def contains(self, digests: Sequence[bytes]) -> list[str | None]:
        """The uppermost tier that has each block."""

    def pin(self, digest: bytes) -> bool:
        """Keep a block in the host tier until as many `unpin`; False if it is nowhere."""

    def unpin(self, digest: bytes) -> bool:
        """End one pin; whether there was one."""

    def flush(self) -> None:
        """Make everything stored so far outlive the process and the machine, where there is a disk tier. Blocks.
        OSError: the disk tier is out."""

    def stats(self) -> dict[str, Any]:
        """A `StoreStats` by tier and, with a disk tier, `flow`: a `StoreFlow`."""

    def close(self) -> None:
        """End all pins and let go of the disk. Does not `flush`. Idempotent."""

    def __enter__(self) -> TieredStore: ...
    def __exit__(self, *_exception: object) -> None: ...

class Pages:
    """Where pages lie in this process's memory.

    Segment `s` of page `p` is `segments[s]` bytes at address `bases[s] + p * strides[s]`; there are `count`
    pages. `owners` own that memory and are kept alive; the addresses must be theirs. Raises ValueError
    for segments that overlap.
    """

    def __new__(
        cls,
        owners: list[object],
        bases: Sequence[int],
        strides: Sequence[int],
        segments: Sequence[int],
        count: int,
    ) -> Pages: ...
    def __len__(self) -> int: ...

class StoreClient:
    """An engine's way to the store of its node. Digests are 32 bytes each, one after the other, in chain order.

    Thread-safe; every method releases the GIL; one request at a time is under way. Methods raise
    ConnectionError when the store is gone or has not answered within `timeout_s`; then `connect` again.
    """

    def __new__(
        cls,
        socket: str,
        *,
        model: str,
        revision: str,
        dtype: str,
        layout: str,
        rank: int,
        ranks: int,
        segments: Sequence[int],
        engine: int,
        timeout_s: float,
    ) -> StoreClient:
        """All but `socket`, `engine` and `timeout_s` are the namespace; `segments` are bytes. `engine` is
        a number all clients of one process share, and no other process has. Does not connect."""

    def connect(self) -> None:
        """Connect unless connected. Raises ValueError where the store cannot hold such blocks."""

    @property
    def connected(self) -> bool:
        """Whether the store is there; notices its death without a request."""

    def close(self) -> None:
        """End the connection, once the last lease is released."""

    def lookup(self, digests: bytes) -> int:
        """How many leading blocks the store has. Those on its disk begin to come to memory."""

    def lookup_for(self, digests: bytes, per_block_s: float) -> tuple[int, bool]:
        """The same for an engine that computes a block in so much time; True: more is being brought from other nodes or
        from object storage, sooner than it could be computed, and the engine should ask again before it begins."""

    def hint(self, digests: bytes, hints: StoreHints) -> None:
        """What requests that use these blocks from now on say of their return."""

    def offload(
        self, parent: bytes | None, digests: bytes, pages: Pages, ids: list[int], tenant: str = ""
    ) -> tuple[int, int, int]:
        """Store the pages `ids`; returns how many were stored, were there already, found no room.

        `parent` is the block before the first, None at a prompt's start. What is new is the `tenant`'s, or
        nobody's. Nobody may write the pages
        meanwhile. Blocks for as long as the copy takes.
        """

    def lease(self, digests: bytes) -> Lease | None:
        """Keep all these blocks in the store for reading; None when one is not there. Does not wait for those that
        still come from its disk: `load` does."""

class Lease:
    """Blocks that stay readable until `release`, even if the store dies. Thread-safe."""

    def load(self, pages: Pages, ids: list[int], first: int, end: int) -> None:
        """Copy segments `first` to `end` (not included) of all blocks into the pages `ids`, and verify.

        Nobody may access the pages meanwhile. Blocks for as long as the copy takes, the first time also until all
        have come from the disk. Raises LookupError when one does not come, and
        CorruptBlockError, after which the pages' contents are not to be used.
        """

    @property
    def origins(self) -> tuple[int, int]:
        """Of these blocks, those that came up from the disk, and from the network, and that no engine has read since."""

    def release(self) -> None:
        """Let the blocks go; idempotent. Afterwards `load` raises ValueError."""

    def __len__(self) -> int: ...

# What has happened on a stream, its number, and with it:
#   ("opened", stream, method), ("called", stream, (method, traceparent, bytes)), ("message", stream, bytes),
#   ("half_closed", stream, None), ("writable", stream, None),
#   ("closed", stream, (gRPC status code, message, {key: value} of binary trailing metadata)).
StreamEvent: TypeAlias = tuple[str, int, Any]

class Streams:
    """Bidirectional gRPC streams of opaque messages, carried by the thread that calls `poll`.

    Nothing blocks, and nothing moves but in `poll`: call it when `fileno` is readable, and soon after any
    other call.
    """

    def __new__(cls) -> Streams:
        """Raises OSError where there are no descriptors left."""

    def fileno(self) -> int:
        """A descriptor that is readable while there is something for `poll`."""

    def secure(self, cert: bytes, key: bytes, ca: bytes, require_client: bool, server_name: str) -> None:
        """Connections made from now on, either way, are TLS with these certificates (PEM): of this process,
        its key, and the authorities of all others'. `server_name` is what servers' certificates are for;
        empty: the host they are reached by. Raises OSError where they cannot be used; then all stays as it
        is."""

    def listen(self, host: str, port: int, streams: set[str], unary: set[str], others: str) -> int:
        """Serve methods (paths), as streams or unary, on host:port; every other call goes to the gRPC server
        on the unix socket `others`. Returns the port. Raises OSError when it cannot listen there."""

    def open(self, address: str, method: str) -> int:
        """Open a stream of a method (a path) on a connection of its own; returns its number. Messages may
        be sent at once; a failure is a "closed" event. Raises OSError for a method that is no path."""

    def send(self, stream: int, message: bytes) -> bool:
        """Queue a message. False when the transport is behind; a "writable" event tells when it has
        caught up."""

    def end(self, stream: int) -> None:
        """End this side after what was sent: a served stream with OK, an opened one by a half-close. A unary
        call is answered by what was sent last."""

    def fail(self, stream: int, code: int, message: str, details: list[tuple[str, bytes]]) -> None:
        """End a served stream, after what was sent, with a gRPC status; `details` is trailing metadata,
        with keys that end in "-bin"."""

    def cancel(self, stream: int) -> None:
        """Cancel an opened stream; no event of it follows but those already waiting."""

    def poll(self) -> list[StreamEvent]:
        """Carry on with what can be done without waiting; what has happened since the last call, in order."""

    def close(self) -> None:
        """Stop listening and drop every stream; what was sent leaves as far as that needs no waiting.
        Idempotent."""

def simulate(words: list[str]) -> int:
    """Runs `kvmesh simulate` with these words and returns its exit status. It prints to the process'
    stdout and stderr, blocks until it is done, and lets other threads run meanwhile. What a signal's
    handler raises ends it, and is raised."""

# Names of the formats of tool calls, and of reasoning.
TOOL_FORMATS: list[str]
REASONING_FORMATS: list[str]

class TextModel:
    """What a checkpoint's tokenizer files say: tokens, chat templates, the formats of tool calls and reasoning.

    Immutable; any thread may use it. Methods that may take long release the GIL.
    """

    def __new__(cls, path: str | os.PathLike[str]) -> TextModel:
        """Read the files of a directory; takes up to seconds.

        Raises KeyError without a `tokenizer.json`, ValueError for files that cannot be read.
        """

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""

    @property
    def tool_format(self) -> str | None:
        """The name of the tool-call format that the chat template shows."""

    @property
    def reasoning_format(self) -> str | None:
        """The name of the reasoning format that the chat template shows."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    def render(
        self,
        messages_json: bytes,
        tools_json: bytes | None = None,
        args_json: bytes | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The text of a conversation, by the chat template.

        `messages_json`, `tools_json`: JSON lists of objects as templates take them; `args_json`: a JSON object of
        further variables, or None. Raises ValueError, with the template's own words where it refuses the
        conversation.
        """

    def encode(
        self, text: str, add_special_tokens: bool = False, limit: int | None = None
    ) -> list[int]:
        """Token ids of a text. `add_special_tokens`: with those that the model wants around a plain prompt.

        Raises OverflowError, with a number of tokens that it has at least, for a text that is seen to have more
        than `limit` before all of it is tokenized.
        """

    def encode_chat(
        self,
        messages_json: bytes,
        tools_json: bytes | None = None,
        args_json: bytes | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        scope: str = "",
        limit: int | None = None,
    ) -> list[int]:
        """Token ids of what `render` gives. What it shares with earlier ones of the same scope is not tokenized
        again, where the tokenizer allows it. `limit` is as for `encode`."""

    def decode(self, token_ids: _Tokens, skip_special: bool = True) -> str:
        """The text of all of an output's ids at once. Unknown ids have none."""

    def token(self, token_id: int) -> tuple[str, bytes]:
        """One token's text and bytes, by itself: the bytes may be part of a character, which the text shows as
        U+FFFD. Empty for an unknown id."""

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text in the vocabulary ("<|im_end|>")."""

    def is_special(self, token_id: int) -> bool:
        """Whether the token is special: part of the protocol, not of the text."""

    def opens_reasoning(self, token_ids: _Tokens, reasoning_format: str | None = None) -> bool | None:
        """Whether a prompt ends within reasoning of a format (None: `reasoning_format`), so that its answer
        begins there; its last 16 tokens are enough. None where it ends with neither mark.

        Raises ValueError for a format of no known name.
        """

class TextDelta:
    """What one step adds to an answer; any part may be empty. False when all are."""

    @property
    def content(self) -> str:
        """The answer's text."""

    @property
    def reasoning(self) -> str:
        """What the model thought before."""

    @property
    def tool_calls(self) -> list[tuple[int, str | None, str | None, str]]:
        """Pieces of tool calls: (index, id, name, piece of the arguments' JSON). `id` and `name` come with a call's
        first piece and are None after it."""

    def __bool__(self) -> bool: ...

class TextStream:
    """Reads one answer: token ids in, what a client sees out. It adds up to the same however the ids are cut."""

    def __new__(
        cls,
        model: TextModel,
        stops: Sequence[str] | None = None,
        tool_format: str | None = None,
        tool_names: Sequence[str] | None = None,
        reasoning_format: str | None = None,
        in_reasoning: bool | None = None,
        skip_special: bool = True,
    ) -> TextStream:
        """`stops`: the text ends before the one that is complete first. `tool_format`, `reasoning_format`: names, or
        None where calls or reasoning are to be text. `tool_names`: the functions there are; a call of another
        is text; empty means any. `in_reasoning`: whether the answer begins within reasoning
        (`TextModel.opens_reasoning`); None means as the format's name says. `skip_special`: special tokens have
        no text, but those that mark calls and reasoning. Raises ValueError for a format of no known name."""

    def feed(self, token_ids: _Tokens) -> TextDelta:
        """What these ids make certain. Behind a stop string nothing more is."""

    def flush(self) -> TextDelta:
        """The rest, once no more ids come, also after a stop string."""

    @property
    def matched(self) -> str | None:
        """The stop string that ended the answer."""

    @property
    def tokens(self) -> int:
        """Ids read so far, up to the one that completed a stop string."""

    @property
    def reasoning_tokens(self) -> int:
        """How many of them were reasoning, its marks included."""
