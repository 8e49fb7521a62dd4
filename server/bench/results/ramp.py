"""`--ramp`: the highest rate at which an objective holds.

The search only proposes rates and is told what probes found; it sends nothing itself.
"""

from dataclasses import asdict, dataclass, field
from math import ceil, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

from server.bench.load import Measured
from server.bench.records import Failure, Records
from server.bench.results.latencies import answered
from server.bench.results.objective import Objective
from server.bench.results.result import Settings
from server.bench.results.statistics import CONFIDENCE
from server.bench.results.verdict import Check, client_limit, judge

_MOST_PROBES = 40
_LOWEST_OF_FIRST = 1 / 1024
_BACKLOG_CONFIDENCE = 0.99


@dataclass(frozen=True, slots=True)
class Probe:
    """What a run at one rate found.

    Attributes:
        rate: sessions a second. passed: whether the objective holds there.
        reason: a sentence why, or why not.
        client_limited: the client was too slow, so the run says nothing of the server.
        too_few: the objective may hold, but so few requests can't show it.
        attainment, interval: share of requests that keep the objective, with Wilson's interval.
        outcomes: the same by outcome, with `requests_per_s` of those that keep it.
    """

    rate: float
    passed: bool
    reason: str
    client_limited: bool = False
    too_few: bool = False
    attainment: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)


def requests_to_prove(share: float, confidence: float = CONFIDENCE) -> int:
    """Return how many requests a probe needs, so that it passes if none misses the objective.

    Wilson's lower bound of n of n is n / (n + z²). A run needs about twice as many, so that some
    may miss it.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return ceil(z * z * share / (1 - share))


def judge_probe(rate: float, measured: Measured, settings: Settings, objective: Objective) -> Probe:
    """Return what a run in an open loop says of its rate.

    It passes if the client wasn't the limit, at least 95% of the rate was sent, the backlog
    doesn't grow, and Wilson's lower bound of the share of requests that keep the objective
    reaches the share that is wanted.
    """
    records = measured.records.where(~measured.records.probe)
    checks = judge(measured, settings.load)
    found = objective.attainment(records, measured.offered_s, open_loop=True)
    low, high = found["interval"]
    limit = client_limit(checks)
    obstacle = _obstacle(records, measured, checks) if limit is None else limit.text
    needed = requests_to_prove(objective.share)
    too_few = obstacle is None and found["requests"] < needed and high >= objective.share
    if obstacle is not None:
        reason = obstacle
    elif low >= objective.share:
        reason = f"{found['attainment']:.2%} of requests kept the objective"
    elif too_few:
        reason = (
            f"{found['requests']:,} requests can't show that {objective.share:.1%} keep the "
            f"objective: it takes {needed:,}, so use a longer --duration"
        )
    else:
        reason = (
            f"{found['attainment']:.2%} of requests kept the objective (95% between {low:.2%} "
            f"and {high:.2%}), which doesn't show that {objective.share:.1%} do"
        )
    return Probe(
        rate=rate,
        passed=obstacle is None and low >= objective.share,
        reason=reason,
        client_limited=limit is not None,
        too_few=too_few,
        attainment=found["attainment"],
        interval=(low, high),
        outcomes=found["outcomes"],
    )


def _obstacle(records: Records, measured: Measured, checks: list[Check]) -> str | None:
    """Return why a rate fails whatever latencies are: the server doesn't keep up."""
    achieved = next(check for check in checks if check.check == "achieved_rate")
    if not achieved.ok:
        return f"only {achieved.value:.1%} of the rate was sent, as answers held all connections"
    if grows(records, measured.began, measured.offered_s):
        grew = "requests came faster than answers, so the backlog grew"
        took = (records.end - records.due)[answered(records)]
        if len(took) and np.median(took) > measured.offered_s / 2:
            grew += "; or --duration is too short, as most requests took more than half of it"
        return grew
    return None


def grows(records: Records, began: float, offered_s: float) -> bool:
    """Return whether the backlog, requests that are due and not ended, grows in a run.

    A server that keeps up ends as many requests as become due, but for chance. Over the second
    half of the offered time (the first one is left for requests in flight to build up) the
    backlog of a stable queue changes by no more than its arrivals vary, whose deviation is the
    root of their number if they are Poisson. So growth beyond 2.33 deviations has a chance of 1%.
    Requests have to take less than half of the offered time.
    """
    middle, end = began + offered_s / 2, began + offered_s
    came = int(((records.due > middle) & (records.due <= end)).sum())
    ended = records.failure != Failure.INTERRUPTED
    left = int(((records.end > middle) & (records.end <= end) & ended).sum())
    return came - left > NormalDist().inv_cdf(_BACKLOG_CONFIDENCE) * sqrt(came)


class Ramp:
    """A search for the knee: doubling until a probe fails, then bisection.

    While `next_rate` gives a rate, run a probe of it and tell the ramp what it found. The rate
    that is found holds, and one that is at most `resolution` higher doesn't. A rate with too few
    requests to tell is doubled as if it held, since a higher one has more of them, and no rate is
    sought below it.

    Args:
        first: the rate to begin with, in sessions a second; lower ones follow if it fails.
        resolution: by which share the answer may be too low.
    """

    def __init__(self, first: float, resolution: float = 0.05) -> None:
        self._first, self._resolution = first, resolution
        self._low: float | None = None
        self._high: float | None = None
        self._untold = 0.0
        """The highest rate whose requests were too few."""
        self.probes: list[Probe] = []

    def next_rate(self) -> float | None:
        """Return the rate of the next probe; None when the search is over."""
        if len(self.probes) >= _MOST_PROBES or (self.probes and self.probes[-1].client_limited):
            return None
        if self._high is None:
            return self.probes[-1].rate * 2 if self.probes else self._first
        if self._low is None:
            lower = self._high / 2
            is_sought = lower >= self._first * _LOWEST_OF_FIRST and lower > self._untold
            return lower if is_sought else None
        if self._high <= self._low * (1 + self._resolution):
            return None
        return (self._low + self._high) / 2

    def tell(self, probe: Probe) -> None:
        """Take what the probe of `next_rate` found."""
        self.probes.append(probe)
        if probe.passed:
            self._low = probe.rate
        elif probe.too_few and self._low is None:
            self._untold = probe.rate
        elif not probe.client_limited:
            self._high = probe.rate

    def result(self) -> dict[str, Any]:
        """Return the knee, whole and by outcome, and all probes.

        `outcomes` has, for each, its share of the load at the knee, and the highest probed rate
        at which its own requests kept the objective.
        """
        is_client = bool(self.probes) and self.probes[-1].client_limited
        at_knee = next((probe for probe in self.probes if probe.rate == self._low), None)
        return {
            "rate": self._low,
            "fails_at": self._high,
            "resolution": self._resolution,
            "limited_by": "client" if is_client else "server" if self._high else None,
            "text": self._text(is_client=is_client),
            "outcomes": self._by_outcome(at_knee),
            "probes": [asdict(probe) for probe in self.probes],
        }

    def _text(self, *, is_client: bool) -> str:
        if is_client:
            last = self.probes[-1]
            held = "no rate" if self._low is None else f"{self._low:,.4g} sessions/s"
            return (
                f"the client is the limit at {last.rate:,.4g} sessions/s, so the server can "
                f"do more than is known ({held} held): {last.reason}"
            )
        if self._untold and self._low is None:
            untold = next(probe for probe in self.probes if probe.rate == self._untold)
            return (
                f"no rate is known at which the objective holds; at {untold.rate:,.4g} sessions/s "
                f"it may: {untold.reason}"
            )
        if self._low is None:
            why = f": {self.probes[-1].reason}" if self.probes else ""
            return f"the objective holds at no rate that was tried{why}"
        if self._high is None:
            return f"the objective holds at {self._low:,.4g} sessions/s; higher ones weren't tried"
        failed = next(probe for probe in self.probes if probe.rate == self._high)
        return (
            f"the objective holds up to {self._low:,.4g} sessions/s; at {self._high:,.4g} it "
            f"doesn't: {failed.reason}"
        )

    def _by_outcome(self, at_knee: Probe | None) -> dict[str, dict[str, Any]]:
        names = sorted({name for probe in self.probes for name in probe.outcomes})
        return {
            name: {
                "highest_kept": max(
                    (
                        probe.rate
                        for probe in self.probes
                        if not probe.client_limited
                        and name in probe.outcomes
                        and probe.outcomes[name]["holds"]
                    ),
                    default=None,
                ),
                "at_knee": None if at_knee is None else at_knee.outcomes.get(name),
            }
            for name in names
        }
