"""Prometheus metrics of the models' engines."""

from collections.abc import Callable, Iterable

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from server.engine.supervisor import EngineState

ModelState = tuple[str, EngineState, int, int]
"""A model's name, its engine's state, the number of restarts, and of requests under way."""


class EngineCollector(Collector):
    """Reads the states of the engines when it is scraped.

    Args:
        models: returns the state of each model.
    """

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
        requests = GaugeMetricFamily(
            "tierserve_engine_requests", "Requests at the engine now", labels=("model",)
        )
        for model, now, starts, active in self._models():
            for state in EngineState:
                gauge.add_metric((model, state), state == now)
            restarts.add_metric((model,), starts)
            requests.add_metric((model,), active)
        return gauge, restarts, requests
