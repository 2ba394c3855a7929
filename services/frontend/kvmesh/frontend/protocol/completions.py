"""The body of /v1/completions."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from kvmesh.common.errors import invalid
from kvmesh.frontend.protocol.body import INT32_MAX, List, PromptToken, PromptTokens
from kvmesh.frontend.protocol.generation import MAX_CHOICES, GenerationRequest
from kvmesh.frontend.protocol.sampling import MAX_TOP_LOGPROBS
from kvmesh.v1.engine_pb2 import SamplingParams

# OpenAI's, for this endpoint only.
DEFAULT_MAX_TOKENS = 16
# Choices of one request, over all its prompts.
_MOST = 2_048

Prompts = str | List[str] | PromptTokens | List[List[PromptToken]]


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    """a text, token ids, or several of either"""
    max_tokens: int | None = Field(default=None, ge=0, le=INT32_MAX)
    """0: nothing but the prompt, with `echo`"""
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    """choices to generate, of which the `n` likeliest are answered"""
    echo: bool | None = None
    suffix: str | None = None
    """what stands behind the answer, of models that were trained to write between two texts"""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    def check(self) -> None:
        super().check()
        drawn, wanted = self.drawn(), self.wanted()
        if drawn < wanted:
            raise invalid(f"best_of must be at least n, which is {wanted}", "best_of")
        if self.stream and drawn > wanted:
            raise invalid(
                "best_of must equal n where stream is true: only whole choices are judged", "best_of"
            )
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens must be at least 1 without echo", "max_tokens")
        if self.suffix and self.echo:
            raise invalid("suffix and echo exclude each other", "suffix")
        if self.suffix and not all(isinstance(prompt, str) for prompt in self.prompts()):
            raise invalid("suffix needs prompts that are text", "suffix")
        if len(self.prompts()) * drawn > _MOST:
            raise invalid(f"prompts times n must not be more than {_MOST} choices", "prompt")

    def sampling(self) -> SamplingParams:
        params = super().sampling()
        if self.max_tokens == 0:
            # An engine has no way to compute a prompt alone.
            params.max_new_tokens = 1
        if self.logprobs is None and self.drawn() > self.wanted():
            # By which they are judged.
            params.top_logprobs = 0
        if self.logprobs is not None:
            params.top_logprobs = self.logprobs
            if self.echo:
                params.prompt_logprobs = True
        return params

    def drawn(self) -> int:
        return self.wanted() if self.best_of is None else self.best_of

    def shows_scores(self) -> bool:
        return self.logprobs is not None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids. Raises KvmeshError where one, and the suffix, is empty."""
        prompt: Any = self.prompt
        prompts = (
            [prompt] if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int) else prompt
        )
        if not all(prompts) and not self.suffix:
            raise invalid("prompt must not be empty", "prompt")
        return prompts
