"""The Engine contract: token ids in, token ids out, one batch of results an engine step.

An engine belongs to one asyncio event loop; every method is called from that loop and none blocks
it. Implementations: `kvmesh.engine.sglang`, `kvmesh.engine.mock`; the conformance suite
`tests/contract/test_engine.py` runs them all.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from kvmesh.common.block_names import block_salt
from kvmesh.common.errors import KvmeshError


class Role(StrEnum):
    """What the engine does with a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"


class ConstraintKind(StrEnum):
    """How a constraint is written; the values are engine.proto's."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    EBNF = "ebnf"
    STRUCTURAL_TAG = "structural_tag"


@dataclass(frozen=True, slots=True)
class Constraint:
    """A language that every output belongs to, unless it ends by length first."""

    kind: ConstraintKind
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Defaults are OpenAI's; temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    # None: up to the context length.
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    # Added to the logits of these tokens.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    constraint: Constraint | None = None
    # The likeliest tokens to report in each place, 0 to 20; None: no log probabilities at all.
    top_logprobs: int | None = None
    # The prompt's log probabilities, too; needs `top_logprobs`.
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Where the two halves of a split request meet; `room` is fresh, random, 63 bits."""

    host: str
    port: int
    room: int


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request. `token_ids` is not copied and must not change while the request lives."""

    # For logs and traces; engines name requests themselves.
    request_id: str
    token_ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    # Required by prefill and decode engines, refused by aggregated ones.
    bootstrap: Bootstrap | None = None
    cache_salt: str = ""
    priority: int = 0
    # The name of a LoRA adapter; empty: the model as it is.
    adapter: str = ""

    @property
    def block_salt(self) -> str:
        """Under which its blocks are named, in events and in the store."""
        return block_salt(self.cache_salt, self.adapter)


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """Prompt tokens that were not computed, by the tier they came from."""

    device: int = 0
    host: int = 0
    nvme: int = 0
    network: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds inside the engine, and the KV bytes handed over; 0 where unknown."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    transfer_ms: float = 0.0
    transfer_bytes: int = 0
    # Until the last of its cached blocks had come from the node's store; computing goes on meanwhile.
    load_ms: float = 0.0


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a request is over. `error` is set for ERROR, `matched_token_id` for STOP."""

    reason: FinishReason
    matched_token_id: int | None = None
    error: KvmeshError | None = None


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log probability under the model, before temperature, and (id, log probability) of the
    likeliest in its place, likeliest first."""

    logprob: float
    top: Sequence[tuple[int, float]] = ()


@dataclass(slots=True)
class StepOutput:
    """What one engine step gave one request.

    `token_ids` holds the new tokens only (a matched stop token included). The first output of a
    request carries `cached`; the last, and only the last, `finish`. `timing` may come with either.
    `logprobs` has one for each of `token_ids` where `top_logprobs` asks for them. `prompt_logprobs`,
    of the prompt's tokens but the first, comes with the first output of prefill and aggregated engines.
    From an engine that embeds a request gets one output: no tokens, its `finish`, and the `embedding`.
    """

    handle: int
    token_ids: Sequence[int]
    finish: Finish | None = None
    cached: CachedTokens | None = None
    timing: Timing | None = None
    logprobs: Sequence[Logprob] = ()
    prompt_logprobs: Sequence[Logprob] = ()
    # The prompt's vector, of length 1.
    embedding: Sequence[float] = ()


# Called once an engine step with the outputs of all requests submitted with it. Must not block or raise.
StepSink = Callable[[list[StepOutput]], None]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a started engine is; constant while it runs."""

    role: Role
    context_length: int
    vocab_size: int
    # Tokens in a block, blocks in the device pool, bytes of a block over all layers.
    page_size: int
    total_blocks: int
    block_bytes: int
    eos_token_ids: tuple[int, ...]
    # The engine's events name blocks in its own way, with their tokens, from which the worker names them.
    own_hashes: bool = False
    # Where decode engines find this one; set for PREFILL.
    bootstrap_host: str = ""
    bootstrap_port: int = 0
    # What it computes on, e.g. "NVIDIA H200" or "cpu"; and prompt tokens in one pass, 0: not known.
    device: str = ""
    pass_tokens: int = 0
    # Numbers in a vector of an engine that embeds; 0: it generates. Engines that embed are aggregated, take
    # prompts as long as the context, and look at no sampling.
    embedding_size: int = 0
    # Of an engine that generates: whether it keeps to constraints, and its LoRA adapters by name.
    constraints: bool = False
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """What an engine has measured of itself; empty where its role does none of it, or there was no time."""

    # Prompts of so many tokens, computed with nothing cached and nothing beside them: (tokens, ms).
    prefill: tuple[tuple[int, float], ...] = ()
    # (streams, share of the device pool's blocks they hold, ms between the tokens of each).
    decode: tuple[tuple[int, float, float], ...] = ()
    # KV handed to another engine: (tokens, ms).
    transfer: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class StoreTraffic:
    """What went between an engine and its node's store since its start, in pages."""

    offloaded: int = 0
    # The store had no room for them, or was not there.
    refused: int = 0
    # Not even tried, because the copier was behind.
    shed: int = 0
    loaded: int = 0
    # Loads, not pages, that were begun and failed; their requests were aborted, to be tried again.
    failed_loads: int = 0


@dataclass(slots=True)
class EngineLoad:
    """Gauges of this moment and totals since the start."""

    requests: int = 0
    queued_requests: int = 0
    # Blocks live requests reference; cached but unreferenced blocks are in `blocks_cached`.
    blocks_used: int = 0
    blocks_cached: int = 0
    transfers: int = 0
    prompt_tokens_total: int = 0
    output_tokens_total: int = 0
    transferred_bytes_total: int = 0
    store: StoreTraffic = field(default_factory=StoreTraffic)


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Blocks now on the device: 64-bit page hashes, each the parent of the next."""

    hashes: Sequence[int]
    # The block before the first; None for a prompt's first block.
    parent: int | None = None
    # From engines with hashes of their own: the tokens of all the blocks; and of a prompt's first blocks the
    # `EngineRequest.block_salt` they are cached under. Those whose salt is not told cannot be named.
    token_ids: Sequence[int] = ()
    block_salt: str | None = None


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    hashes: Sequence[int]


@dataclass(frozen=True, slots=True)
class BlocksCleared:
    """The device holds no block any more, or none that is known for sure."""

    # Why what was known is forgotten: `lost`, events were lost beyond repair; `restart`, the engine is
    # another; empty: the engine said so.
    reason: str = ""


KvEvent = BlocksStored | BlocksRemoved | BlocksCleared


class Engine(ABC):
    """One running model. Life: `start`, any number of requests, `close`."""

    @abstractmethod
    async def start(self) -> EngineInfo:
        """Load the model and become ready. Raises KvmeshError(ENGINE_FAILED) with the engine's reason."""

    @abstractmethod
    def submit(self, request: EngineRequest, sink: StepSink) -> int:
        """Queue a request; its outputs go to `sink`, ending with exactly one `finish`.

        Returns the handle that names the request in `abort` and in its outputs. Raises
        KvmeshError before anything is queued when the request cannot run: INVALID_ARGUMENT (a
        token id outside the vocabulary, an empty prompt), CONTEXT_LENGTH_EXCEEDED, WRONG_ROLE, UNSUPPORTED
        (a constraint the engine has no means for, an adapter it has not). A constraint that cannot be
        compiled ends the request with INVALID_ARGUMENT and param `constraint` before any of it is
        computed.
        """

    @abstractmethod
    def abort(self, handle: int) -> None:
        """End a request: its sink gets a CANCELLED finish once its blocks are free.

        Unknown handles are ignored.
        """

    @abstractmethod
    def load(self) -> EngineLoad:
        """The load now; cheap enough to call many times a second."""

    @abstractmethod
    def kv_events(self) -> AsyncGenerator[list[KvEvent], None]:
        """Changes of the device's cached blocks in order, from the empty state on. One consumer at a time;
        the next one goes on where the last has stopped."""

    @abstractmethod
    async def cache_prompt(self, token_ids: Sequence[int], cache_salt: str = "") -> None:
        """Run a prompt, with no peer whatever the role, and leave its whole blocks in the cache.

        A decode engine has nobody to compute them, so their content may be anything: for prompts that
        nobody asks for. Raises KvmeshError, as a request for it would end with.
        """

    @abstractmethod
    async def probe(self) -> Probe:
        """Measure what work takes, in some two seconds at most; for engines that run nothing else meanwhile.

        Leaves no trace: no block in the device's cache or in a tier below, no event, nothing in the totals of
        the load. What takes longer is left out. Raises KvmeshError when the engine has died.
        """

    @abstractmethod
    async def flush_cache(self) -> None:
        """Forget the cached blocks that no request references.

        Raises KvmeshError(OVERLOADED) while requests run.
        """

    @abstractmethod
    async def failed(self) -> KvmeshError:
        """Return, with the reason, once the engine has died; otherwise never."""

    @abstractmethod
    async def close(self) -> None:
        """Stop the engine and release everything; idempotent. Live requests end with an ERROR finish."""

    async def generate(self, request: EngineRequest) -> AsyncGenerator[StepOutput, None]:
        """One request as an async generator; closing or cancelling it aborts the request."""
        queue: asyncio.Queue[StepOutput] = asyncio.Queue()

        def sink(outputs: list[StepOutput]) -> None:
            for output in outputs:
                queue.put_nowait(output)

        handle = self.submit(request, sink)
        finished = False
        try:
            while not finished:
                output = await queue.get()
                finished = output.finish is not None
                yield output
        finally:
            if not finished:
                self.abort(handle)
