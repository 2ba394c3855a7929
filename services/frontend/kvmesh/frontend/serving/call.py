"""One request in the mesh's own terms, the same from REST and gRPC."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from kvmesh.common.capabilities import missing, needed
from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.core import largest_token
from kvmesh.frontend.models import Model
from kvmesh.frontend.tenants.charge import Charge
from kvmesh.frontend.tokenizer import TooLong
from kvmesh.v1.common_pb2 import (
    CAPABILITY_CONSTRAIN,
    CAPABILITY_EMBED,
    CAPABILITY_GENERATE,
    CAPABILITY_LOGPROBS,
    Capability,
)
from kvmesh.v1.engine_pb2 import SamplingParams
from kvmesh.v1.errors_pb2 import ErrorCode
from kvmesh.v1.router_pb2 import ReturnHint

# A token id in an array.
TOKEN = "I"


@dataclass(slots=True)
class Call:
    """What is to be generated. Fit to be placed: lengths and token ids have been checked."""

    request_id: str
    model: Model
    # Of type `TOKEN`: they are checked, hashed and sent as a whole.
    token_ids: array[int]
    # `max_new_tokens` is set.
    sampling: SamplingParams
    # Seconds, of `time.monotonic`.
    deadline: float
    received: float = field(default_factory=time.monotonic)
    explain: bool = False
    policy: str = ""
    session_id: str = ""
    tenant: str = ""
    priority: int = 0
    # What is known of its return; None: nothing.
    hint: ReturnHint | None = None
    # When its first token must be there, as `deadline`; None: by then.
    first_by: float | None = None
    # Names of an engine's parameters -> of the client's fields they come from, for errors.
    params: Mapping[str, str] = field(default_factory=dict)
    # What its workers must be able to do.
    needs: Sequence[Capability] = ()
    # Begins the names of its blocks, so that only requests with the same one share them.
    cache_salt: str = ""
    # Reserved before the request is placed, settled when it ends; None: nobody counts.
    charge: Charge | None = None


def new_request_id() -> str:
    return f"req_{os.urandom(16).hex()}"


def check_generates(model: Model) -> None:
    """Raise KvmeshError(UNSUPPORTED) for a model that only embeds."""
    if not model.generates:
        raise KvmeshError(
            ErrorCode.ERROR_CODE_UNSUPPORTED,
            f"the model {model.info.name!r} has no capability `generate`: it embeds; ask /v1/embeddings, or "
            "another model",
            param="model",
        )


def check_embeds(model: Model) -> None:
    """Raise KvmeshError(UNSUPPORTED) for a model that only generates."""
    if not model.embeds:
        raise KvmeshError(
            ErrorCode.ERROR_CODE_UNSUPPORTED,
            f"the model {model.info.name!r} has no capability `embed`: it generates; name one that embeds",
            param="model",
        )


def needs_of(sampling: SamplingParams, *, embeds: bool) -> list[Capability]:
    """What a request's workers must be able to do."""
    if embeds:
        return [CAPABILITY_EMBED]
    needs = [CAPABILITY_GENERATE]
    if sampling.HasField("constraint"):
        needs.append(CAPABILITY_CONSTRAIN)
    if sampling.HasField("top_logprobs"):
        needs.append(CAPABILITY_LOGPROBS)
    return needs


def check_offered(model: Model, needs: Sequence[Capability], params: Mapping[str, str]) -> None:
    """Raise KvmeshError(UNSUPPORTED) where no workers of the model have what is needed."""
    error = missing(model.info.name, needed(needs, model.adapter), model.offers)
    if error is None:
        return
    places = {CAPABILITY_CONSTRAIN: params.get("constraint", "constraint"), CAPABILITY_LOGPROBS: "logprobs"}
    lacking = (place for one, place in places.items() if one in needs and not model.can(one))
    error.param = next(lacking, "model")
    raise error


def packed(model: Model, token_ids: Sequence[int], param: str) -> array[int]:
    """A prompt as an array, which nobody changes: one that is an array is taken as it is.

    Raises KvmeshError for ids that are not even 32 bits of a natural number.
    """
    if isinstance(token_ids, array):
        return token_ids
    try:
        return array(TOKEN, token_ids)
    except OverflowError:
        raise _outside(model, param) from None


def check_prompt(model: Model, token_ids: array[int], param: str, *, embeds: bool = False) -> None:
    """Raise KvmeshError unless the model takes the prompt and has room for an answer."""
    if not token_ids:
        raise invalid(f"{param} must not be empty", param)
    if len(token_ids) > most_tokens(model, embeds=embeds):
        raise _too_long(model, str(len(token_ids)), param, embeds=embeds)


def most_tokens(model: Model, *, embeds: bool = False) -> int:
    """Of a prompt. One that is embedded is all there is, and may fill the context."""
    return model.info.context_length - (not embeds)


async def within_context(
    model: Model, prompt: Awaitable[list[int]], param: str, *, embeds: bool = False
) -> list[int]:
    """A prompt that is tokenized with `most_tokens` for a limit.

    Raises KvmeshError where it was given up for its length, with the tokens that it has at least.
    """
    try:
        return await prompt
    except TooLong as error:
        raise _too_long(model, f"at least {error.tokens}", param, embeds=embeds) from None


def _too_long(model: Model, tokens: str, param: str, *, embeds: bool) -> KvmeshError:
    most = f"this model's maximum context length is {model.info.context_length} tokens"
    has = f"but {param} has" if embeds else "prompt and answer together, but the prompt alone has"
    return KvmeshError(
        ErrorCode.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED,
        f"{most}, {has} {tokens} tokens; shorten it",
        param=param,
    )


def check_ids(model: Model, token_ids: Collection[int], param: str) -> None:
    """Raise KvmeshError unless all ids, which clients chose, are in the vocabulary."""
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < model.info.vocab_size:
        raise _outside(model, param)


def check_prompt_ids(model: Model, token_ids: array[int], param: str) -> None:
    """`check_ids` for a prompt, which may be long and is not empty."""
    if largest_token(token_ids) >= model.info.vocab_size:
        raise _outside(model, param)


def _outside(model: Model, param: str) -> KvmeshError:
    return invalid(f"{param} must hold token ids from 0 to {model.info.vocab_size - 1}", param)


def bound_output(model: Model, prompt_tokens: int, sampling: SamplingParams, default: int | None) -> None:
    """Set `max_new_tokens` to what was asked for, or `default`, as far as the context has room."""
    room = model.info.context_length - prompt_tokens
    wanted = sampling.max_new_tokens if sampling.HasField("max_new_tokens") else default
    sampling.max_new_tokens = room if wanted is None else min(wanted, room)
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise invalid(
            f"min_tokens of {sampling.min_new_tokens} is more than the {sampling.max_new_tokens} tokens "
            "the answer may have",
            "min_tokens",
        )
