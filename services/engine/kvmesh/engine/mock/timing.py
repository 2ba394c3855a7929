"""How long the mock engine's steps take, and keeping to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from kvmesh.common.served import MockConfig
from kvmesh.engine.contract import Probe, Role

# A process that had no CPU for longer than this does not hurry to catch up.
MAX_LAG_S = 0.05
# A law shows at any two sizes; more of them make it count for more.
_PROBED_TOKENS, _PROBED_STREAMS = (16, 64, 256, 1024, 4096), (1, 8, 64)


class TimingModel:
    """Seconds of real time for each kind of work."""

    def __init__(self, config: MockConfig) -> None:
        self._config = config

    def prefill_s(self, tokens: int) -> float:
        """One forward pass over `tokens` uncached prompt tokens, of one or more requests."""
        config = self._config
        return (config.prefill_base_ms + config.prefill_token_ms * tokens) / 1000 / config.speedup

    def decode_s(self, sequences: int) -> float:
        """One token for each of `sequences` requests."""
        config = self._config
        return (config.decode_base_ms + config.decode_sequence_ms * sequences) / 1000 / config.speedup

    def transfer_s(self, size: int) -> float:
        """`size` bytes from prefill to decode."""
        return size / (self._config.transfer_gib_s * (1 << 30)) / self._config.speedup

    def probe(self, role: Role, *, embeds: bool) -> Probe:
        """What an engine of this role would measure, without the time that takes."""
        config = self._config
        token_bytes = config.block_bytes / config.page_size
        prefill = tuple((tokens, 1000 * self.prefill_s(tokens)) for tokens in _PROBED_TOKENS)
        decode = tuple((streams, 0.0, 1000 * self.decode_s(streams)) for streams in _PROBED_STREAMS)
        transfer = tuple((n, 1000 * self.transfer_s(round(n * token_bytes))) for n in _PROBED_TOKENS)
        return Probe(
            prefill=() if role is Role.DECODE else prefill,
            decode=() if role is Role.PREFILL or embeds else decode,
            transfer=transfer if role is Role.PREFILL else (),
        )


class Pacer:
    """Ends each step when the model says, although timers are late: lateness is taken off the next step."""

    def __init__(self, clock: Callable[[], float], sleep: Callable[[float], Awaitable[None]]) -> None:
        self._clock = clock
        self._sleep = sleep
        self._planned_end = 0.0

    async def step(self, seconds: float) -> None:
        """Wait for a step that follows the last one, or begins now if the engine was idle."""
        now = self._clock()
        begin = self._planned_end if now - self._planned_end < MAX_LAG_S else now
        self._planned_end = begin + seconds
        await self._sleep(max(0.0, self._planned_end - now))

    def rest(self) -> None:
        """The engine is idle: the next step begins when it begins."""
        self._planned_end = float("-inf")
