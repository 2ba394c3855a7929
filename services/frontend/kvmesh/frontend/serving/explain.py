"""Where a request ran and how long each part of its way took, as proto and as JSON."""

from __future__ import annotations

import time
from typing import Any

from kvmesh.frontend.serving.answers import Answers
from kvmesh.frontend.serving.session import Session
from kvmesh.v1.common_pb2 import CachedTokens
from kvmesh.v1.frontend_pb2 import Explanation, TimingMs, Usage

_TIERS = ("device", "host", "nvme", "network")


def usage(answers: Answers) -> Usage:
    """Tokens of prompts and answers, as far as the answers have come.

    A prompt counts once, cached as far as none of its choices had to compute it.
    """
    sessions, choices = answers.sessions, answers.choices
    prompts = [sessions[i : i + choices] for i in range(0, len(sessions), choices)]
    used = Usage(
        prompt_tokens=sum(len(each[0].call.token_ids) for each in prompts),
        completion_tokens=sum(session.output_tokens for session in sessions),
        reasoning_tokens=answers.reasoning_tokens,
    )
    for each in prompts:
        least = min((session.attempt.cached for session in each), key=_all_tiers)
        for tier in _TIERS:
            setattr(used.cached, tier, getattr(used.cached, tier) + getattr(least, tier))
    return used


def explanation(session: Session) -> Explanation:
    """The way of a session that has started; `total` is the time until now."""
    attempt, received = session.attempt, session.call.received
    placement = attempt.routed.placement
    split = placement.HasField("prefill")
    prompt, output = attempt.prefill_timing, attempt.generate_timing
    return Explanation(
        request_id=session.call.request_id,
        mode="disaggregated" if split else "aggregated",
        prefill=placement.prefill.id,
        decode=placement.decode.id,
        cached=attempt.cached,
        timing=TimingMs(
            queue=prompt.queue_ms,
            route=session.route_ms,
            prefill=prompt.prefill_ms,
            # Each side measures its own wait; the hand-over is over when both are.
            transfer=max(prompt.transfer_ms, output.transfer_ms),
            ttft=(attempt.first_at - received) * 1000 if attempt.first_at else 0.0,
            total=(time.monotonic() - received) * 1000,
        ),
        candidates=attempt.routed.candidates,
        policy=attempt.routed.policy,
        continued_on=session.continued_on,
    )


def explanation_json(session: Session) -> dict[str, Any]:
    """The `kvmesh` object of an answer."""
    said = explanation(session)
    return {
        "request_id": said.request_id,
        "policy": said.policy,
        "placement": {"mode": said.mode, "prefill": said.prefill or None, "decode": said.decode}
        | ({"continued_on": list(said.continued_on)} if said.continued_on else {}),
        "cached_tokens": _tiers(said.cached),
        "timing_ms": {
            name: round(getattr(said.timing, name), 3)
            for name in ("queue", "route", "prefill", "transfer", "ttft", "total")
        },
        "candidates": [
            {
                "prefill": candidate.prefill_id or None,
                "decode": candidate.decode_id,
                "cost": candidate.cost,
                "terms": dict(candidate.terms),
                "cached_tokens": _tiers(candidate.cached),
            }
            for candidate in said.candidates
        ],
    }


def usage_json(used: Usage) -> dict[str, Any]:
    """OpenAI's `usage` object, and beside its own fields the tiers that the cached tokens came from."""
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": _all_tiers(used.cached),
            "audio_tokens": 0,
            "kvmesh_cached_tokens": _tiers(used.cached),
        },
        "completion_tokens_details": {
            "reasoning_tokens": used.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _tiers(cached: CachedTokens) -> dict[str, int]:
    return {tier: getattr(cached, tier) for tier in _TIERS}


def _all_tiers(cached: CachedTokens) -> int:
    return sum(getattr(cached, tier) for tier in _TIERS)
