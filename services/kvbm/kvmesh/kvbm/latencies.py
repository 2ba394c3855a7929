"""How long the tiers took, as a Prometheus histogram: the store counts, this only reads when it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kvmesh.core import StoreServer

NAME = "kvmesh_kvbm_latency_seconds"


class Latencies(Collector):
    """`kvmesh_kvbm_latency_seconds` by tier and operation. Reading it takes no lock of the store's."""

    def __init__(self, store: StoreServer) -> None:
        self._store = store

    def describe(self) -> Iterator[Metric]:
        yield _family()

    def collect(self) -> Iterator[Metric]:
        family = _family()
        for tier, operation, counts, seconds in self._store.latencies():
            totals = accumulate(count for _, count in counts)
            buckets = [
                (floatToGoString(bound), total) for (bound, _), total in zip(counts, totals, strict=True)
            ]
            family.add_metric([tier, operation], buckets, sum_value=seconds)
        yield family


def _family() -> HistogramMetricFamily:
    return HistogramMetricFamily(
        NAME,
        "by the store: an engine's load from memory, a block's way elsewhere",
        labels=["tier", "operation"],
    )
