"""What is checked before a request may touch the mock engine."""

from __future__ import annotations

from kvmesh.common.errors import KvmeshError, invalid
from kvmesh.engine.adapters import check_adapter
from kvmesh.engine.contract import EngineInfo, EngineRequest, Role
from kvmesh.v1.errors_pb2 import ErrorCode

MAX_TOP_LOGPROBS = 20


def check_request(request: EngineRequest, info: EngineInfo) -> None:
    """Raise KvmeshError, as `Engine.submit` promises, for a request the engine cannot run."""
    tokens = request.token_ids
    if not tokens:
        raise invalid("the prompt is empty; send at least one token", "token_ids")
    if min(tokens) < 0 or max(tokens) >= info.vocab_size:
        worst = max(tokens) if min(tokens) >= 0 else min(tokens)
        raise invalid(f"token id {worst} is outside the vocabulary of {info.vocab_size}", "token_ids")
    if info.embedding_size:
        if len(tokens) > info.context_length:
            raise KvmeshError(
                ErrorCode.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED,
                f"the input has {len(tokens)} tokens, and the context {info.context_length}; shorten it",
                param="token_ids",
            )
        _check_role(request, info)
        return
    if len(tokens) >= info.context_length:
        raise KvmeshError(
            ErrorCode.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED,
            f"the prompt has {len(tokens)} tokens and leaves no room for an answer in a context of "
            f"{info.context_length}; shorten it",
            param="token_ids",
        )
    limit = request.sampling.max_new_tokens
    if limit is not None and limit < 1:
        raise invalid(f"max_new_tokens is {limit}; it must be at least 1", "max_new_tokens")
    sampling = request.sampling
    if sampling.constraint is not None:
        raise KvmeshError(
            ErrorCode.ERROR_CODE_UNSUPPORTED,
            "the mock engine cannot keep to a constraint; ask for free text, or serve by another engine",
            param="constraint",
        )
    check_adapter(request.adapter, info)
    if (
        sampling.logit_bias
        and not 0 <= min(sampling.logit_bias) <= max(sampling.logit_bias) < info.vocab_size
    ):
        raise invalid(f"logit_bias must name token ids below {info.vocab_size}", "logit_bias")
    if not all(-100 <= bias <= 100 for bias in sampling.logit_bias.values()):
        raise invalid("logit_bias must be between -100 and 100", "logit_bias")
    if sampling.top_logprobs is not None and not 0 <= sampling.top_logprobs <= MAX_TOP_LOGPROBS:
        raise invalid(f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}", "top_logprobs")
    if sampling.prompt_logprobs and sampling.top_logprobs is None:
        raise invalid("prompt_logprobs needs top_logprobs", "prompt_logprobs")
    _check_role(request, info)


def _check_role(request: EngineRequest, info: EngineInfo) -> None:
    if (request.bootstrap is None) != (info.role is Role.AGGREGATED):
        expected = "takes no" if info.role is Role.AGGREGATED else "needs a"
        raise KvmeshError(
            ErrorCode.ERROR_CODE_WRONG_ROLE,
            f"this worker is {info.role} now and {expected} bootstrap address; route the request again",
        )
