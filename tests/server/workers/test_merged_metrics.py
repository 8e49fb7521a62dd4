"""The metrics of several workers as one: sums that never fall, whoever dies."""

import math
from collections.abc import Iterable

import orjson
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from server.auth.collector import TenantCollector
from server.auth.limits import Limits, RateLimiter
from server.engine.collector import EngineCollector, ModelState, UpstreamCollector, UpstreamState
from server.engine.routing.load import UpstreamCounts
from server.engine.supervisor import EngineState
from server.prefix_tier.collector import PrefixCollector
from server.prefix_tier.tier import PrefixNumbers
from server.telemetry.metrics import Metrics
from server.workers.merged_metrics import MergedMetrics, snapshot
from tiers import Chain, FrequencySketch, MemoryCache, Tier
from tiers.singleflight.lock import LockStats

BOUNDS = ("0.1", "1", "+Inf")


class Worker(Collector):
    """Counts requests by tier, with seconds, and has a gauge."""

    def __init__(self) -> None:
        self.requests: dict[str, list[float]] = {}

    def answer(self, tier: str, seconds: float) -> None:
        self.requests.setdefault(tier, []).append(seconds)

    def collect(self) -> Iterable[Metric]:
        counter = CounterMetricFamily("c", "Requests", labels=("tier",))
        saved = CounterMetricFamily("s", "Seconds", labels=("tier",))
        histogram = HistogramMetricFamily("h", "Seconds", labels=("tier",))
        for tier, seconds in self.requests.items():
            counter.add_metric((tier,), len(seconds))
            saved.add_metric((tier,), sum(seconds))
            buckets = [(bound, sum(s <= float(bound) for s in seconds)) for bound in BOUNDS]
            histogram.add_metric((tier,), buckets, sum(seconds))
        return counter, saved, histogram, GaugeMetricFamily("g", "Alive", 1)

    def snapshot(self) -> list:
        registry = CollectorRegistry()
        registry.register(self)
        return orjson.loads(orjson.dumps(snapshot(registry)))


class Merged(Collector):
    def __init__(self, merged: MergedMetrics) -> None:
        self._merged = merged

    def collect(self) -> Iterable[Metric]:
        return self._merged.families()


def shown(merged: MergedMetrics) -> dict[tuple[str, str], dict[str, float]]:
    """Return all samples that a scrape finds, by family and type."""
    registry = CollectorRegistry()
    registry.register(Merged(merged))
    found: dict[tuple[str, str], dict[str, float]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        samples = found.setdefault((family.name, family.type), {})
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            assert samples.setdefault(f"{sample.name}{{{labels}}}", sample.value) is sample.value
    return found


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["memory", "disk", "engine", "scrape", "die"]),
            st.floats(0, 3),
        ),
        max_size=60,
    )
)
def test_nothing_falls_and_nothing_is_lost(steps: list[tuple[int, str, float]]) -> None:
    merged, workers = MergedMetrics(), [Worker() for _ in range(3)]
    all_seconds: dict[str, list[float]] = {}
    before: dict[tuple[str, str], dict[str, float]] = {}
    for number, step, seconds in steps:
        worker = workers[number]
        if step == "die":
            merged.add_worker(number, worker.snapshot())
            merged.forget(number)
            workers[number] = Worker()
        elif step != "scrape":
            worker.answer(step, seconds)
            all_seconds.setdefault(step, []).append(seconds)
            continue
        for alive, each in enumerate(workers):
            merged.add_worker(alive, each.snapshot())
        now = shown(merged)
        for family, samples in before.items():
            assert all(now[family][name] >= value for name, value in samples.items())
        before = now
        assert now["g", "gauge"] == {"g{}": 3}
        for tier, of_tier in all_seconds.items():
            assert now["c", "counter"][f"c_total{{tier={tier}}}"] == len(of_tier)
            assert math.isclose(now["s", "counter"][f"s_total{{tier={tier}}}"], sum(of_tier))
            for bound in BOUNDS:
                within = sum(each <= float(bound) for each in of_tier)
                name = f"h_bucket{{le={bound},tier={tier}}}"
                assert now["h", "histogram"][name] == within


def process(*, state: EngineState, restarts: int, count: int, available: bool = True) -> list:
    """Return the snapshot of a process of a server, whose every count is `count`."""
    tiers = [Tier(name, MemoryCache(1 << 20)) for name in ("memory", "disk")]
    for tier in tiers:
        tier.backend.usage.entries = tier.backend.usage.bytes = count
        tier.backend.usage.evictions = tier.counts.hits = count
    limiter = RateLimiter(Limits())
    for _ in range(count):
        limiter.acquire()
    report = PrefixNumbers(available, 9, count, counters={"m": {"lookups": count}})
    metrics = Metrics(
        Chain(tiers, frequency=FrequencySketch(1), max_answer_bytes=1),
        demotions_dropped=lambda: count,
        lock_stats=LockStats(waiting=count),
        collectors=[
            EngineCollector(lambda: [ModelState("m", state, restarts, count, count, count)]),
            UpstreamCollector(
                lambda: [UpstreamState("m", "u", available, count, UpstreamCounts(*[count] * 4))]
            ),
            TenantCollector(lambda: {"t": limiter}, lambda: count),
            PrefixCollector(lambda: report, ["m"]),
        ],
    )
    for _ in range(count):
        metrics.observe(("m", "memory", "hit"), [0.2], 1, 1.0)
    return orjson.loads(orjson.dumps(snapshot(metrics.registry)))


GAUGES = {
    "tier_entries{tier=memory}": 6, "tier_entries{tier=disk}": 3,
    "tier_bytes{tier=memory}": 6, "tier_bytes{tier=disk}": 3,
    "tier_available{tier=memory}": 1, "tier_available{tier=disk}": 1,
    "flights_waiting{}": 6, "tenant_active{tenant=t}": 6, "engine_requests{model=m}": 3,
    "held_requests{model=m}": 3,
    "upstream_up{model=m,upstream=u}": 0, "upstream_inflight{model=m,upstream=u}": 6,
    "prefix_available{}": 0, "prefix_blocks{}": 3, "prefix_bytes{}": 0, "prefix_file_bytes{}": 0,
    "prefix_free_bytes{}": 0, "prefix_limit_bytes{}": 9,
} | {
    f"engine_state{{model=m,state={state}}}": state is EngineState.READY for state in EngineState
}  # fmt: skip
"""What each gauge of a server is, of a master and workers that count to 1, 2 and 3."""


def test_each_metric_of_a_server_has_its_rule() -> None:
    merged = MergedMetrics()
    master = process(state=EngineState.READY, restarts=4, count=1)
    merged.add_worker(2, process(state=EngineState.DOWN, restarts=0, count=2, available=False))
    merged.add_worker(3, process(state=EngineState.STARTING, restarts=0, count=3))
    merged.add_worker(-1, master)
    one = MergedMetrics()
    one.add_worker(-1, master)
    assert shown(merged).keys() == shown(one).keys()
    gauges = {
        name.removeprefix("tierserve_"): value
        for (_, kind), samples in shown(merged).items()
        for name, value in samples.items()
        if kind == "gauge"
    }
    assert gauges == GAUGES
    for _ in range(2):
        counts = {
            name: value
            for (_, kind), samples in shown(merged).items()
            for name, value in samples.items()
            if kind == "counter" and value
        }
        for name, value in counts.items():
            same = {"tierserve_engine_restarts": 4, "tierserve_prefix_lookups": 3}
            assert value == same.get(name.partition("_total")[0], 6), name
        assert len(counts) == 17
        for number in (-1, 2, 3):
            merged.forget(number)


def test_a_tenant_that_was_removed_counts_anew_under_its_name() -> None:
    merged, requests = MergedMetrics(), "tierserve_tenant_requests"

    def counted(*samples: tuple[str, float]) -> dict[str, float]:
        held = [[f"{requests}_total", {"tenant": name}, count] for name, count in samples]
        merged.add_worker(0, [[requests, "counter", "", held]])
        return {
            sample.labels["tenant"]: sample.value
            for family in merged.families()
            for sample in family.samples
        }

    assert counted(("a", 1), ("b", 1000)) == {"a": 1, "b": 1000}
    assert counted(("a", 1)) == {"a": 1}
    assert counted(("a", 1), ("b", 2)) == {"a": 1, "b": 2}
