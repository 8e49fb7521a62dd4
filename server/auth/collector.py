"""Prometheus metrics of the tenants."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from server.auth.limits import RateLimiter


class TenantCollector(Collector):
    """Reads what tenants have asked when it is scraped.

    Args:
        limiters: returns the rate limiter of each tenant with a key, by its name.
        unauthorized: returns how many requests had no valid key.
    """

    def __init__(
        self, limiters: Callable[[], Mapping[str, RateLimiter]], unauthorized: Callable[[], int]
    ) -> None:
        self._limiters, self._unauthorized = limiters, unauthorized

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "tierserve_tenant_requests", "Requests of tenants with a key", labels=("tenant",)
        )
        refused = CounterMetricFamily(
            "tierserve_tenant_refused", "Requests beyond a limit", labels=("tenant", "limit")
        )
        active = GaugeMetricFamily(
            "tierserve_tenant_active", "Requests under way", labels=("tenant",)
        )
        for name, limiter in self._limiters().items():
            requests.add_metric((name,), limiter.requests)
            active.add_metric((name,), limiter.active)
            for limit, count in limiter.refused.items():
                refused.add_metric((name, limit), count)
        away = CounterMetricFamily("tierserve_turned_away", "Requests without a key that is known")
        away.add_metric((), self._unauthorized())
        return requests, refused, active, away
