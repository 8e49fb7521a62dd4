"""Prometheus metrics: requests by tier and outcome, what tiers hold, the engine's state."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
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


RequestLabels = tuple[str, str, str]
"""A request's model, which is a configured one or empty, its tier and its outcome."""


class Metrics:
    """All metrics of one process, in a registry of their own.

    Args:
        chain: the chain, whose tiers report their sizes and counters.
        demotions_dropped: returns how many demotions found no room in the queue.
        lock_stats: counts the waits for other processes.
        collectors: report the metrics of other packages.
        fallbacks: names of models, each with that of its fallback.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        demotions_dropped: Callable[[], int],
        lock_stats: LockStats,
        collectors: Iterable[Collector],
        fallbacks: Iterable[tuple[str, str]] = (),
    ) -> None:
        self._latencies: dict[RequestLabels, _Latency] = {}
        # From 0, so that Prometheus sees the first one as a rise.
        self._fallbacks = dict.fromkeys(fallbacks, 0)
        self.registry = CollectorRegistry()
        self._requests = _Requests(self._latencies)
        own = (
            self._requests,
            _Fallbacks(self._fallbacks),
            _Tiers(chain, demotions_dropped),
            _Waits(lock_stats),
        )
        for collector in (*own, *collectors):
            self.registry.register(collector)

    def observe(
        self,
        labels: RequestLabels,
        seconds: Sequence[float],
        tokens: int = 0,
        saved_s: float = 0,
    ) -> None:
        """Count answered requests.

        Args:
            labels: those of all of them.
            seconds: how long each took.
            tokens: the output tokens of those answers that may be kept.
            saved_s: the time that it took to generate the answers that tiers served.
        """
        # Plain numbers, since the library's counters would cost a tenth of a hit.
        latency = self._latencies.get(labels)
        if latency is None:
            latency = self._latencies[labels] = _Latency()
        counts = latency.counts
        for each in seconds:
            counts[bisect_left(_BOUNDS_S, each)] += 1
        latency.sum_s += sum(seconds)
        latency.tokens += tokens
        latency.saved_s += saved_s

    def count_fallback(self, models: tuple[str, str]) -> None:
        """Count a request for the first model that the second one has answered."""
        self._fallbacks[models] = self._fallbacks.get(models, 0) + 1

    def collect_after(self, settle: Callable[[], None]) -> None:
        """Call `settle` before requests are reported: some may wait to be counted."""
        self._requests.settle = settle


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
    def __init__(self, latencies: Mapping[RequestLabels, _Latency]) -> None:
        self._latencies = latencies
        self.settle: Callable[[], None] | None = None

    def collect(self) -> Iterable[Metric]:
        if self.settle is not None:
            self.settle()
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


class _Fallbacks(Collector):
    def __init__(self, counts: Mapping[tuple[str, str], int]) -> None:
        self._counts = counts

    def collect(self) -> Iterable[Metric]:
        fallbacks = CounterMetricFamily(
            "tierserve_fallbacks", "Requests for a model that its fallback has answered",
            labels=("model", "fallback"),
        )  # fmt: skip
        for models, count in self._counts.items():
            fallbacks.add_metric(models, count)
        yield fallbacks


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
            available.add_metric((tier_.name,), self._chain.is_available(tier_))
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
