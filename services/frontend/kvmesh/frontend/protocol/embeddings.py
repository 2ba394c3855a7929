"""The body of /v1/embeddings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from kvmesh.common.errors import invalid
from kvmesh.frontend.protocol.body import Body, List, PromptToken, PromptTokens
from kvmesh.frontend.protocol.generation import KvmeshOptions

# OpenAI's bound.
MAX_INPUTS = 2_048

Inputs = str | List[str] | PromptTokens | List[List[PromptToken]]


class EmbeddingRequest(Body):
    model: str = Field(min_length=1)
    input: Inputs
    """a text, token ids, or several of either"""
    encoding_format: Literal["float", "base64"] | None = None
    """base64: of 32-bit floats, little-endian"""
    dimensions: int | None = Field(default=None, ge=1)
    """numbers wanted of each vector: its first ones, made length 1 again"""
    user: str | None = None
    kvmesh: KvmeshOptions = Field(default_factory=KvmeshOptions)

    def inputs(self) -> list[str | list[int]]:
        """Each text or token ids. Raises KvmeshError where one is empty, or there are too many."""
        given: Any = self.input
        inputs = [given] if not isinstance(given, list) or not given or isinstance(given[0], int) else given
        if not all(inputs):
            raise invalid("input must not be empty", "input")
        if len(inputs) > MAX_INPUTS:
            raise invalid(f"input must not be more than {MAX_INPUTS} texts, not {len(inputs)}", "input")
        return inputs

    def session_id(self) -> str:
        return self.kvmesh.session_id or self.user or ""
