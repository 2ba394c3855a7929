"""OpenAI request bodies: what is taken, what is refused by name, what is ignored and reported.

A body is parsed and validated once; nothing of pydantic remains on the path of a token. Types are
strict: `"temperature": "0.5"` is an error, as it is at OpenAI.
"""

from kvmesh.frontend.protocol.body import Body, parse, unsupported, validate
from kvmesh.frontend.protocol.chat import ChatCompletionRequest
from kvmesh.frontend.protocol.completions import CompletionRequest
from kvmesh.frontend.protocol.embeddings import EmbeddingRequest
from kvmesh.frontend.protocol.generation import GenerationRequest, KvmeshOptions, StreamOptions
from kvmesh.frontend.protocol.sampling import SamplingFields, StopFields

__all__ = [
    "Body",
    "ChatCompletionRequest",
    "CompletionRequest",
    "EmbeddingRequest",
    "GenerationRequest",
    "KvmeshOptions",
    "SamplingFields",
    "StopFields",
    "StreamOptions",
    "parse",
    "unsupported",
    "validate",
]
