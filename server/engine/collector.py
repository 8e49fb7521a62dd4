"""What Prometheus is told of the models' engines."""

from collections.abc import Callable, Iterable

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from server.engine.supervisor import EngineState

ModelState = tuple[str, EngineState, int, int]
"""Of a model: its name, what can be expected of its engine, how often that was restarted, and how
many requests are there now."""


class _Models(Collector):
    def __init__(self, models: Callable[[], Iterable[ModelState]]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        gauge = GaugeMetricFamily(
            "tierserve_engine_state", "1 for the state that a model's engine is in",
            labels=("model", "state"),
        )  # fmt: skip
        restarts = CounterMetricFamily(
            "tierserve_engine_restarts", "Starts after the first", labels=("model",)
        )
        asked = GaugeMetricFamily(
            "tierserve_engine_requests", "Requests at the engine now", labels=("model",)
        )
        for model, now, starts, requests in self._models():
            for state in EngineState:
                gauge.add_metric((model, state), state == now)
            restarts.add_metric((model,), starts)
            asked.add_metric((model,), requests)
        return gauge, restarts, asked
