"""The body of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from kvmesh.common.errors import invalid
from kvmesh.frontend.protocol.body import INT32_MAX, List, TokenId, unsupported
from kvmesh.frontend.protocol.generation import GenerationRequest
from kvmesh.frontend.protocol.sampling import MAX_TOP_LOGPROBS
from kvmesh.v1.engine_pb2 import SamplingParams

# OpenAI's, for this endpoint only.
DEFAULT_MAX_TOKENS = 16
# Choices of one request, over all its prompts.
_MOST = 2_048

Prompts = str | List[str] | Annotated[List[TokenId], Field(min_length=1)] | List[List[TokenId]]


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    """a text, token ids, or several of either"""
    max_tokens: int | None = Field(default=None, ge=0, le=INT32_MAX)
    """0: nothing but the prompt, with `echo`"""
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported("best_of", "must equal n: which choices are best is not judged")
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens must be at least 1 without echo", "max_tokens")
        if self.suffix:
            raise unsupported("suffix", "is not supported; remove it")
        if len(self.prompts()) * (self.n or 1) > _MOST:
            raise invalid(f"prompts times n must not be more than {_MOST} choices", "prompt")

    def sampling(self) -> SamplingParams:
        params = super().sampling()
        if self.max_tokens == 0:
            # An engine has no way to compute a prompt alone.
            params.max_new_tokens = 1
        if self.logprobs is not None:
            params.top_logprobs = self.logprobs
            if self.echo:
                params.prompt_logprobs = True
        return params

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids. Raises KvmeshError where one is empty."""
        prompt: Any = self.prompt
        prompts = (
            [prompt] if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int) else prompt
        )
        if not all(prompts):
            raise invalid("prompt must not be empty", "prompt")
        return prompts
