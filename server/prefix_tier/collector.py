"""Prometheus metrics of the prefix tier."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.prefix_tier.tier import PrefixNumbers
from tiers.prefix_kv.counters import COUNTERS

_GAUGES = {
    "available": ("available", "0 while the store can't be read"),
    "blocks": ("blocks", "Blocks held"),
    "bytes": ("block_bytes", "Bytes of the pages that blocks take"),
    "file_bytes": ("file_bytes", "Bytes of all files"),
    "free_bytes": ("free_bytes", "Bytes of the files' pages that no block takes"),
    "limit_bytes": ("max_bytes", "Bytes that the files may have"),
}


class PrefixCollector(Collector):
    """Gives the last report when it is scraped, and so waits for no disk.

    Args:
        report: returns it.
        models: those whose engines use the tier, so that their counters are there from the start.
    """

    def __init__(self, report: Callable[[], PrefixNumbers], models: Sequence[str]) -> None:
        self._report, self._models = report, models

    def collect(self) -> Iterable[Metric]:
        report = self._report()
        for name, (field, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"tierserve_prefix_{name}", text, getattr(report, field))
        none: Mapping[str, float] = {}
        counted = dict.fromkeys(self._models, none) | {**report.counters}
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(f"tierserve_prefix_{name}", text, labels=("model",))
            for model, of_model in counted.items():
                counter.add_metric((model,), of_model.get(name, 0))
            yield counter
