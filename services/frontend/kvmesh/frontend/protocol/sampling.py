"""How tokens are chosen and when the answer ends: what REST and gRPC share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kvmesh.common.errors import invalid
from kvmesh.frontend.protocol.body import INT32_MAX, Body, List, TokenId
from kvmesh.v1.engine_pb2 import SamplingParams

StopString = Annotated[str, Field(min_length=1)]
StopStringList = Annotated[List[StopString], Field(max_length=16)]
Bias = Annotated[float, Field(ge=-100, le=100)]

# Of each place in the answer.
MAX_TOP_LOGPROBS = 20
_MAX_BIASES = 4_096


class SamplingFields(Body):
    """Null and absent mean the model's default."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    """0: the likeliest token alone"""
    top_k: int | None = Field(default=None, ge=-1, le=INT32_MAX)
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    max_tokens: int | None = Field(default=None, ge=1, le=INT32_MAX)
    min_tokens: int | None = Field(default=None, ge=0, le=INT32_MAX)
    stop_token_ids: List[TokenId] | None = Field(default=None, max_length=256)
    ignore_eos: bool | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**64 - 1)
    logit_bias: dict[str, Bias] | None = Field(default=None, max_length=_MAX_BIASES)
    """token id, as a string, to what is added to its logit"""

    def sampling(self) -> SamplingParams:
        """The same for an engine. Output is bounded by `call.bound_output`, not here."""
        said = {
            "temperature": self.temperature,
            # Engines take no 0, and "the likeliest alone" by `top_k`, where 0 is another spelling of "all".
            "top_p": self.top_p or None,
            "top_k": 1 if self.top_p == 0 else self.top_k or None,
            "min_p": self.min_p,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
            "max_new_tokens": self.max_tokens,
            "min_new_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
        }
        # Most say little, and what is said costs.
        params = SamplingParams(**{name: value for name, value in said.items() if value is not None})
        if self.stop_token_ids:
            params.stop_token_ids.extend(self.stop_token_ids)
        if self.seed is not None:
            # Engines take 63 bits.
            params.seed = self.seed & (2**63 - 1)
        for name, bias in (self.logit_bias or {}).items():
            params.logit_bias[_token(name)] = bias
        return params


class StopFields(Body):
    stop: StopString | StopStringList | None = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


def _token(name: str) -> int:
    if not (name.isascii() and name.isdecimal() and len(name) <= 10 and int(name) <= INT32_MAX):
        raise invalid(f"logit_bias must have token ids for names, not {name[:64]!r}", "logit_bias")
    return int(name)
