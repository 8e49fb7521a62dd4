"""What the pages show of all workers together: the last day, the tiers, the prefixes of prompts.

What a dead worker reported last stays part of it.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from server.telemetry.history import STEP_S, STEPS, History
from server.telemetry.prefixes import Prefixes

Report = Mapping[str, Any]
"""A history as `History.report` returns it."""

_OF_OWN_MEMORY = "memory"
_HELD = frozenset({"bytes", "entries", "max_bytes"})


class MergedHistories:
    """The histories of tenants in all workers; under an empty name that of all tenants."""

    def __init__(self) -> None:
        self._reports: dict[int, dict[str, Report]] = {}
        self._of_dead: dict[str, Report] = {}

    def add_worker(self, worker_id: int, reports: Mapping[str, Report]) -> None:
        """Replace a worker's reports of these tenants by later ones; those of others stay."""
        self._reports.setdefault(worker_id, {}).update(reports)

    def forget(self, worker_id: int) -> None:
        """Note that a worker has died: what it reported stays. Its number is free again."""
        for tenant, report in self._reports.pop(worker_id, {}).items():
            before = self._of_dead.get(tenant)
            self._of_dead[tenant] = report if before is None else merge_histories([before, report])

    def report(self, tenant: str, at: float) -> Report:
        """Return the history of a tenant up to now, which is `at` (Unix s)."""
        of_all = [self._of_dead, *self._reports.values()]
        reports = [reports[tenant] for reports in of_all if tenant in reports]
        return merge_histories([History().report(at), *reports])


class MergedPrefixes:
    """The most frequent prefixes of all workers together.

    Args:
        clock: returns Unix seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._summaries: dict[int, Mapping[str, Any]] = {}
        self._of_dead = Prefixes(clock)

    def add_worker(self, worker_id: int, summary: Mapping[str, Any]) -> None:
        """Replace a worker's summary (`Prefixes.summary`) by a later one."""
        self._summaries[worker_id] = summary

    def forget(self, worker_id: int) -> None:
        """Note that a worker has died: what it counted stays. Its number is free again."""
        if (summary := self._summaries.pop(worker_id, None)) is not None:
            self._of_dead.merge(summary)

    def report(self) -> dict[str, Any]:
        """Return the prefixes, as `Prefixes.report` does."""
        merged = Prefixes(self._clock)
        for summary in (self._of_dead.summary(), *self._summaries.values()):
            merged.merge(summary)
        return merged.report()


def merge_histories(reports: Sequence[Report]) -> Report:
    """Return several histories, at least one, as one, which ends when the last of them ends.

    It begins with the first of them, but at most a day before its end.
    """
    ends_at = max(report["ends_at"] for report in reports)
    # How many steps before the end each begins.
    ages = [
        (ends_at - each["ends_at"]) // STEP_S + len(each["tokens_saved"])
        if each["tokens_saved"]
        else 0
        for each in reports
    ]
    steps = min(STEPS, max(ages))
    aged = list(zip(reports, ages, strict=True))

    def summed(rings: Iterable[tuple[Sequence[float], int]]) -> list[Any]:
        total: list[float] = [0] * steps
        for ring, age in rings:
            for place, number in enumerate(ring, steps - age):
                if 0 <= place < steps:
                    total[place] += number
        return total

    tiers = dict.fromkeys(tier for each in reports for tier in each["answered"])
    saved = [report["saved_since_start"] for report in reports]
    seconds = summed((each["seconds_saved"], age) for each, age in aged)
    return {
        "step_s": STEP_S,
        "ends_at": ends_at,
        "answered": {
            tier: summed((each["answered"].get(tier, ()), age) for each, age in aged)
            for tier in tiers
        },
        "tokens_saved": summed((each["tokens_saved"], age) for each, age in aged),
        "seconds_saved": [round(each, 3) for each in seconds],
        "saved_since_start": {
            "tokens": sum(each["tokens"] for each in saved),
            "seconds": round(sum(each["seconds"] for each in saved), 3),
        },
    }


def merge_tiers(reports: Iterable[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the tiers of all workers as one list; each worker has the same tiers.

    Counts are summed, and so is what the memory tiers hold and may hold: each worker has its own.
    All see the same other tiers. A tier is available if it is to all of them.
    """
    merged: dict[str, dict[str, Any]] = {}
    for tiers in reports:
        for tier in tiers:
            before = merged.setdefault(tier["tier"], {})
            is_own = tier["tier"] == _OF_OWN_MEMORY
            for name, value in tier.items():
                if name not in before:
                    before[name] = value
                elif name == "available":
                    before[name] = before[name] and value
                elif name in _HELD and not is_own:
                    before[name] = max(before[name], value)
                elif isinstance(value, int | float):
                    before[name] += value
    return list(merged.values())
