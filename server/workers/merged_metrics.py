"""The metrics of all workers as one: what `/metrics` shows where several processes serve.

Counters and histograms are summed, and a dead worker's stay in the sums, so that nothing falls when
it is replaced. Gauges, and counters that all processes read from one place, have a rule each.
prometheus_client's own multiprocess mode knows no collectors of ours.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

Snapshot = list[list[Any]]
"""A process's metrics as JSON holds them: name, type, documentation and samples of each family.

A sample is a name, labels and a value.
"""
_Key = tuple[str, tuple[tuple[str, str], ...]]
"""A sample's name and its labels."""
_Rule = Callable[[list[float]], float]
"""Makes one value of those of the processes, lowest number first."""


def _first(values: list[float]) -> float:
    return values[0]


# All others are summed.
_RULES: Mapping[str, _Rule] = {
    # The master runs the engines, and has the lowest number. All processes see all requests.
    "tierserve_engine_state": _first,
    "tierserve_engine_restarts": _first,
    "tierserve_engine_requests": max,
    "tierserve_held_requests": max,
    # The master probes upstreams; each worker ejects those that fail it.
    "tierserve_upstream_up": min,
    "tierserve_tier_available": min,
    "tierserve_prefix_available": min,
}
# All processes read these from one store, counters included.
_ONE_STORE = "tierserve_prefix_"
# Each process has a memory tier of its own, and all see the same other tiers.
_OF_TIERS = ("tierserve_tier_bytes", "tierserve_tier_entries")
_OWN_TIER = ("tier", "memory")


def snapshot(registry: CollectorRegistry) -> Snapshot:
    """Return what the registry holds now, as `MergedMetrics` takes it."""
    return [
        [family.name, family.type, family.documentation, list(map(_sample, family.samples))]
        for family in registry.collect()
    ]


def _sample(sample: Sample) -> list[Any]:
    return [sample.name, sample.labels, float(sample.value)]


class _Family:
    """A family of several processes: the values of each sample."""

    __slots__ = ("documentation", "kind", "values")

    def __init__(self, kind: str, documentation: str) -> None:
        self.kind, self.documentation = kind, documentation
        self.values: dict[_Key, list[float]] = {}

    @property
    def never_falls(self) -> bool:
        return self.kind in ("counter", "histogram")


class MergedMetrics:
    """The last snapshots of all workers, and the counts of those that have died.

    Bounded by what a worker reports: it has one number more for each sample.
    """

    def __init__(self) -> None:
        self._snapshots: dict[int, Snapshot] = {}
        self._of_dead: dict[str, _Family] = {}
        self._shown: dict[_Key, float] = {}

    def add_worker(self, worker_id: int, snapshot: Snapshot) -> None:
        """Replace a worker's snapshot by a later one.

        Args:
            worker_id: its number; the master's is the lowest.
            snapshot: of its registry.
        """
        self._snapshots[worker_id] = snapshot

    def forget(self, worker_id: int) -> None:
        """Note that a worker has died: its gauges go, its counts stay. Its number is free again."""
        dead = _add({}, self._snapshots.pop(worker_id, []))
        for name, family in dead.items():
            if family.never_falls:
                kept = self._of_dead.setdefault(name, _Family(family.kind, family.documentation))
                for key, values in family.values.items():
                    before = kept.values.get(key, [])
                    kept.values[key] = [_rule(name, key)(before + values)]

    def families(self) -> Iterator[Metric]:
        """Yield the metrics of all workers together."""
        families: dict[str, _Family] = {}
        # Of what is gone, such as a removed tenant, a later one of its name begins anew.
        before, self._shown = self._shown, {}
        for _, each in sorted(self._snapshots.items()):
            _add(families, each)
        for name, dead in self._of_dead.items():
            family = families.setdefault(name, _Family(dead.kind, dead.documentation))
            for key, values in dead.values.items():
                family.values.setdefault(key, []).extend(values)
        for name, family in families.items():
            metric = Metric(name, family.documentation, family.kind)
            for key, values in family.values.items():
                value = _rule(name, key)(values)
                if family.never_falls:
                    # Sums of floats in another order may be smaller.
                    value = self._shown[key] = max(value, before.get(key, 0.0))
                metric.add_sample(key[0], dict(key[1]), value)
            yield metric


def _add(families: dict[str, _Family], snapshot: Snapshot) -> dict[str, _Family]:
    """Add a process's samples to families, and return them."""
    for name, kind, documentation, samples in snapshot:
        family = families.setdefault(name, _Family(kind, documentation))
        for sample, labels, value in samples:
            family.values.setdefault((sample, tuple(labels.items())), []).append(value)
    return families


def _rule(family: str, key: _Key) -> _Rule:
    if (rule := _RULES.get(family)) is not None:
        return rule
    is_one = family.startswith(_ONE_STORE) or (family in _OF_TIERS and _OWN_TIER not in key[1])
    return max if is_one else sum
