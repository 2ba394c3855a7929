"""Placements as metrics."""

from __future__ import annotations

from kvmesh.common.metrics import RouterMetrics
from kvmesh.core import Placed


def count_placed(metrics: RouterMetrics, placed: Placed) -> None:
    mode = "aggregated" if placed.prefill == placed.decode else "disaggregated"
    metrics.placed_by(placed.policy, mode).inc()
    metrics.waited.observe(placed.held_ms / 1000)
    for counter, tokens in zip(metrics.cached_by_tier.values(), placed.cached, strict=True):
        if tokens:
            counter.inc(tokens)


def count_shadows(metrics: RouterMetrics, placed: Placed) -> None:
    """What policies that look on would have done."""
    made = placed.prefill, placed.decode
    for policy, prefill, decode, cost, ttft, live_cost, live_ttft in placed.shadows():
        choice = "same" if (prefill, decode) == made else "other"
        metrics.shadow_placements.labels(policy, choice).inc()
        metrics.shadow_regret.labels(policy).observe((live_cost - cost) / 1000)
        for of, cost_ms, ttft_ms in (("shadow", cost, ttft), ("live", live_cost, live_ttft)):
            metrics.shadow_cost.labels(policy, of).inc(cost_ms / 1000)
            metrics.shadow_ttft.labels(policy, of).inc(ttft_ms / 1000)
