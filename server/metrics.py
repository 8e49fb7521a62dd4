"""Prometheus metrics: requests by tier and outcome, what tiers hold, the engine's state."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tiers import Chain
from tiers.backend import ByteCache

_BUCKETS_S = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.01,
    0.05,
    0.1,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    300,
)


class Metrics:
    """All metrics of one process, in a registry of their own."""

    def __init__(self, chain: Chain, *, ready: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        labels = ("tier", "outcome")
        self._requests = Counter(
            "tierserve_requests", "Requests answered", labels, registry=self.registry
        )
        self._seconds = Histogram(
            "tierserve_request_seconds", "Seconds from request to the end of its answer",
            labels, registry=self.registry, buckets=_BUCKETS_S,
        )  # fmt: skip
        Gauge(
            "tierserve_engine_ready", "1 while an engine answers", registry=self.registry
        ).set_function(lambda: float(ready()))
        self.registry.register(_TierCollector(chain))

    def observe(self, tier: str, outcome: str, seconds: float) -> None:
        """Count one answered request."""
        self._requests.labels(tier, outcome).inc()
        self._seconds.labels(tier, outcome).observe(seconds)


class _TierCollector(Collector):
    """Reads the tiers' own counts when asked."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    def collect(self) -> Iterable[Metric]:
        tiers = self._chain.tiers
        usages = [(t.name, t.backend.usage) for t in tiers if isinstance(t.backend, ByteCache)]
        for name in ("entries", "bytes"):
            gauge = GaugeMetricFamily(f"tierserve_tier_{name}", f"{name} held", labels=("tier",))
            for tier, usage in usages:
                gauge.add_metric((tier,), getattr(usage, name))
            yield gauge
        for name in ("evictions", "expirations", "damaged", "refused"):
            yield _counter(name, [(tier, getattr(usage, name)) for tier, usage in usages])
        for name in ("hits", "misses", "stores", "errors"):
            yield _counter(name, [(tier.name, getattr(tier.counts, name)) for tier in tiers])


def _counter(name: str, values: Iterable[tuple[str, int]]) -> Metric:
    counter = CounterMetricFamily(f"tierserve_tier_{name}", f"{name} so far", labels=("tier",))
    for tier, value in values:
        counter.add_metric((tier,), value)
    return counter
