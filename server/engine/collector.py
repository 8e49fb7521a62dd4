"""Prometheus metrics of the models' engines and upstreams."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from server.engine.routing.load import UpstreamCounts
from server.engine.supervisor import EngineState


class ModelState(NamedTuple):
    """A model's engine or upstreams, and the requests for them."""

    model: str
    state: EngineState
    restarts: int
    active: int
    """Requests under way, in all processes."""
    found_none: int
    """Requests of this process that found no engine."""
    waiting: int
    """Of these, those that wait for one now, in all processes."""


class UpstreamState(NamedTuple):
    """An upstream, and what this process has sent to it."""

    model: str
    name: str
    is_up: bool
    active: int
    """Requests under way."""
    counts: UpstreamCounts


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
        found_none = CounterMetricFamily(
            "tierserve_no_engine", "Requests that found no engine ready", labels=("model",)
        )
        waiting = GaugeMetricFamily(
            "tierserve_held_requests", "Of these, those held for an engine now", labels=("model",)
        )
        for each in self._models():
            of = (each.model,)
            for state in EngineState:
                gauge.add_metric((*of, state), state == each.state)
            restarts.add_metric(of, each.restarts)
            requests.add_metric(of, each.active)
            found_none.add_metric(of, each.found_none)
            waiting.add_metric(of, each.waiting)
        return gauge, restarts, requests, found_none, waiting


class UpstreamCollector(Collector):
    """Reads the states of the upstreams when it is scraped.

    Args:
        upstreams: returns the state of each.
    """

    def __init__(self, upstreams: Callable[[], Iterable[UpstreamState]]) -> None:
        self._upstreams = upstreams

    def collect(self) -> Iterable[Metric]:
        labels = ("model", "upstream")
        up = GaugeMetricFamily(
            "tierserve_upstream_up", "Whether an upstream takes requests", labels=labels
        )
        in_flight = GaugeMetricFamily(
            "tierserve_upstream_inflight", "Requests at the upstream now", labels=labels
        )
        requests = CounterMetricFamily(
            "tierserve_upstream_requests", "Requests sent to the upstream", labels=labels
        )
        prompt_tokens = CounterMetricFamily(
            "tierserve_upstream_prompt_tokens", "Tokens of prompts, by its answers", labels=labels
        )
        cached_tokens = CounterMetricFamily(
            "tierserve_upstream_cached_tokens", "Those found in its own cache", labels=labels
        )
        overflow = CounterMetricFamily(
            "tierserve_upstream_overflow",
            "Requests that came because one which knows their beginning had too much to do",
            labels=labels,
        )
        for model, name, is_up, active, counts in self._upstreams():
            of = (model, name)
            up.add_metric(of, is_up)
            in_flight.add_metric(of, active)
            requests.add_metric(of, counts.requests)
            prompt_tokens.add_metric(of, counts.prompt_tokens)
            cached_tokens.add_metric(of, counts.cached_tokens)
            overflow.add_metric(of, counts.overflow)
        return up, in_flight, requests, prompt_tokens, cached_tokens, overflow
