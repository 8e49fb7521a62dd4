"""What Prometheus is told of the tenants."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from server.auth.limits import RateLimiter


class _Tenants(Collector):
    def __init__(
        self, accounts: Callable[[], Mapping[str, RateLimiter]], turned_away: Callable[[], int]
    ) -> None:
        self._accounts, self._turned_away = accounts, turned_away

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
        for name, account in self._accounts().items():
            requests.add_metric((name,), account.requests)
            active.add_metric((name,), account.active)
            for limit, count in account.refused.items():
                refused.add_metric((name, limit), count)
        away = CounterMetricFamily("tierserve_turned_away", "Requests without a key that is known")
        away.add_metric((), self._turned_away())
        return requests, refused, active, away
