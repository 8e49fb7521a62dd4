"""Prometheus metrics: requests by tier and outcome, what tiers hold, the engine's state."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tiers import Chain
from tiers.singleflight.lock import LockStats

_BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300,
)  # fmt: skip


class Metrics:
    """All metrics of one process, in a registry of their own.

    Args:
        chain: the chain, whose tiers report their sizes and counters.
        demotions_dropped: returns how many demotions found no room in the queue.
        lock_stats: counts the waits for other processes.
        collectors: report the metrics of other packages.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        demotions_dropped: Callable[[], int],
        lock_stats: LockStats,
        collectors: Iterable[Collector],
    ) -> None:
        self._latencies: dict[tuple[str, str, str], _Latency] = {}
        self.registry = CollectorRegistry()
        own = _Requests(self._latencies), _Tiers(chain, demotions_dropped), _Waits(lock_stats)
        for collector in (*own, *collectors):
            self.registry.register(collector)

    def observe(
        self,
        model: str,
        tier: str,
        outcome: str,
        seconds: float,
        tokens: int = 0,
        saved_s: float = 0,
    ) -> None:
        """Count one answered request; `model` is a configured one, or empty.

        `tokens` are the output tokens of an answer that may be kept. `saved_s` is the time that it
        took to generate the answer that a tier served.
        """
        # Plain numbers, since the library's counters would cost a tenth of a hit.
        latency = self._latencies.get((model, tier, outcome))
        if latency is None:
            latency = self._latencies[model, tier, outcome] = _Latency()
        latency.counts[bisect_left(_BOUNDS_S, seconds)] += 1
        latency.sum_s += seconds
        latency.tokens += tokens
        latency.saved_s += saved_s


class _Latency:
    """A histogram: requests by bucket, the last one being without bound, and their seconds.

    With it, the output tokens of their answers, and the seconds that tiers have saved.
    """

    __slots__ = ("counts", "saved_s", "sum_s", "tokens")

    def __init__(self) -> None:
        self.counts = [0] * (len(_BOUNDS_S) + 1)
        self.sum_s = self.saved_s = 0.0
        self.tokens = 0


class _Requests(Collector):
    def __init__(self, latencies: Mapping[tuple[str, str, str], _Latency]) -> None:
        self._latencies = latencies

    def collect(self) -> Iterable[Metric]:
        labels = ("model", "tier", "outcome")
        requests = CounterMetricFamily("tierserve_requests", "Requests answered", labels=labels)
        seconds = HistogramMetricFamily(
            "tierserve_request_seconds", "Seconds from request to the end of its answer",
            labels=labels,
        )  # fmt: skip
        tokens = CounterMetricFamily(
            "tierserve_output_tokens", "Output tokens of the answers that may be kept",
            labels=labels,
        )  # fmt: skip
        saved = CounterMetricFamily(
            "tierserve_saved_seconds", "Seconds that it once took to generate what tiers answered",
            labels=labels,
        )  # fmt: skip
        bounds = [*map(str, _BOUNDS_S), "+Inf"]
        for values, latency in self._latencies.items():
            requests.add_metric(values, sum(latency.counts))
            buckets = list(zip(bounds, accumulate(latency.counts), strict=True))
            seconds.add_metric(values, buckets, latency.sum_s)
            tokens.add_metric(values, latency.tokens)
            saved.add_metric(values, latency.saved_s)
        return requests, seconds, tokens, saved


class _Waits(Collector):
    def __init__(self, stats: LockStats) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        waits = CounterMetricFamily(
            "tierserve_flight_waits", "Flights that waited for another process, by the wait's end",
            labels=("end",),
        )  # fmt: skip
        for end in ("answered", "took_over", "gave_up", "aborted"):
            waits.add_metric((end,), getattr(self._stats, end))
        waiting = GaugeMetricFamily("tierserve_flights_waiting", "Flights that wait now")
        waiting.add_metric((), self._stats.waiting)
        return waits, waiting


class _Tiers(Collector):
    """Reads the tiers' own counters when it is scraped."""

    def __init__(self, chain: Chain, demotions_dropped: Callable[[], int]) -> None:
        self._chain, self._demotions_dropped = chain, demotions_dropped

    def collect(self) -> Iterable[Metric]:
        tiers = self._chain.tiers
        usages = [(tier.name, tier.local.usage) for tier in tiers if tier.local is not None]
        for name in ("entries", "bytes"):
            gauge = GaugeMetricFamily(f"tierserve_tier_{name}", f"{name} held", labels=("tier",))
            for tier, usage in usages:
                gauge.add_metric((tier,), getattr(usage, name))
            yield gauge
        for name in ("evictions", "expirations", "damaged", "refused"):
            yield _counter(name, [(tier, getattr(usage, name)) for tier, usage in usages])
        for name in ("hits", "misses", "stores", "promotions", "demotions", "errors", "busy"):
            yield _counter(name, [(tier.name, getattr(tier.counts, name)) for tier in tiers])
        available = GaugeMetricFamily(
            "tierserve_tier_available", "0 while it fails and isn't called", labels=("tier",)
        )
        for tier_ in tiers:
            available.add_metric((tier_.name,), tier_.available)
        yield available
        queues = {
            "demotions": self._demotions_dropped(),
            "promotions": self._chain.promotions_dropped,
        }
        for name, count in queues.items():
            dropped = CounterMetricFamily(
                f"tierserve_{name}_dropped", f"{name.capitalize()} dropped from a full queue"
            )
            dropped.add_metric((), count)
            yield dropped
        purges = CounterMetricFamily("tierserve_purges", "Purges requested of this process")
        purges.add_metric((), self._chain.purged)
        yield purges
        errors = CounterMetricFamily(
            "tierserve_shared_purge_errors", "Failed exchanges of purges with other machines"
        )
        errors.add_metric((), self._chain.purge_errors)
        yield errors


def _counter(name: str, values: Iterable[tuple[str, int]]) -> Metric:
    counter = CounterMetricFamily(f"tierserve_tier_{name}", f"{name} so far", labels=("tier",))
    for tier, value in values:
        counter.add_metric((tier,), value)
    return counter
