"""A request's sampling in SGLang's terms, checked as SGLang's own frontend would: its scheduler checks
nothing and dies of what it cannot sample.
"""

from __future__ import annotations

import math
from typing import Any

from kvmesh.common.errors import invalid
from kvmesh.engine.contract import Role, Sampling

# SGLang's "every token".
_TOP_K_ALL = 1 << 30
# Below this SGLang decodes greedily.
_GREEDY = 1e-6
_SEEDS = 1 << 63
# OpenAI's most; a prefill engine hands over up to 128.
_TOP_LOGPROBS = 20


def sampling_fields(sampling: Sampling, role: Role, vocab_size: int, room: int) -> dict[str, Any]:
    """SGLang's SamplingParams by name. `room` is the most tokens that still fit.

    Raises KvmeshError(INVALID_ARGUMENT) that names the parameter.
    """
    check_sampling(sampling, vocab_size)
    greedy = sampling.temperature < _GREEDY
    longest = room if sampling.max_new_tokens is None else min(sampling.max_new_tokens, room)
    fields: dict[str, Any] = {
        # A prefill engine samples the first token only; room for more would be reserved in vain.
        "max_new_tokens": 1 if role is Role.PREFILL else longest,
        "min_new_tokens": min(sampling.min_new_tokens, longest),
        "temperature": 1.0 if greedy else sampling.temperature,
        "top_k": 1 if greedy else _TOP_K_ALL if sampling.top_k == -1 else sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "ignore_eos": sampling.ignore_eos,
    }
    if sampling.stop_token_ids:
        fields["stop_token_ids"] = sorted(set(sampling.stop_token_ids))
    if sampling.seed is not None:
        fields["sampling_seed"] = sampling.seed % _SEEDS
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.constraint is not None:
        fields[sampling.constraint.kind.value] = sampling.constraint.text
    return fields


def logprob_fields(sampling: Sampling, role: Role) -> dict[str, Any]:
    """What of SGLang's request asks for log probabilities. Both halves of a split request ask: prefill
    samples the first token, and hands its over with the KV."""
    if sampling.top_logprobs is None:
        return {}
    # A decode engine computes no prompt.
    prompt = sampling.prompt_logprobs and role is not Role.DECODE
    return {
        "return_logprob": True,
        "top_logprobs_num": sampling.top_logprobs,
        "logprob_start_len": 0 if prompt else -1,
    }


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    s = sampling
    checks = (
        ("temperature", math.isfinite(s.temperature) and s.temperature >= 0, "a number of at least 0"),
        ("top_p", 0 < s.top_p <= 1, "above 0 and at most 1"),
        ("min_p", 0 <= s.min_p <= 1, "between 0 and 1"),
        ("top_k", s.top_k == -1 or s.top_k >= 1, "-1 or at least 1"),
        ("frequency_penalty", -2 <= s.frequency_penalty <= 2, "between -2 and 2"),
        ("presence_penalty", -2 <= s.presence_penalty <= 2, "between -2 and 2"),
        ("repetition_penalty", 0 < s.repetition_penalty <= 2, "above 0 and at most 2"),
        ("max_new_tokens", s.max_new_tokens is None or s.max_new_tokens >= 1, "at least 1"),
        ("min_new_tokens", s.min_new_tokens >= 0, "at least 0"),
    )
    for name, good, wanted in checks:
        if not good:
            raise invalid(f"{name} must be {wanted}, not {getattr(s, name)}", name)
    if s.max_new_tokens is not None and s.min_new_tokens > s.max_new_tokens:
        raise invalid(f"min_new_tokens must be at most max_new_tokens, {s.max_new_tokens}", "min_new_tokens")
    if s.logit_bias and not (min(s.logit_bias) >= 0 and max(s.logit_bias) < vocab_size):
        raise invalid(f"logit_bias must name token ids below {vocab_size}", "logit_bias")
    if not all(-100 <= bias <= 100 for bias in s.logit_bias.values()):
        raise invalid("logit_bias must be between -100 and 100", "logit_bias")
    if s.top_logprobs is not None and not 0 <= s.top_logprobs <= _TOP_LOGPROBS:
        raise invalid(f"top_logprobs must be between 0 and {_TOP_LOGPROBS}", "top_logprobs")
    if s.prompt_logprobs and s.top_logprobs is None:
        raise invalid("prompt_logprobs needs top_logprobs", "prompt_logprobs")
    if s.constraint is not None and s.min_new_tokens:
        # Where the constraint allows the end only, nothing would be left to sample from.
        raise invalid("min_new_tokens cannot be kept under a constraint; remove one", "min_new_tokens")
    if s.stop_token_ids and not (min(s.stop_token_ids) >= 0 and max(s.stop_token_ids) < vocab_size):
        raise invalid(f"stop_token_ids must be below {vocab_size}", "stop_token_ids")
