"""An objective of `--objective`: limits that a share of all requests has to keep."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.bench.records import Failure, Records
from server.bench.results.latencies import answered, first_token, last_token, time_per_token
from server.bench.results.statistics import wilson
from server.config.base import ConfigError

METRICS = ("ttft", "tpot", "itl", "e2e")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_read_limit = re.compile(
    r"(?:(?P<outcome>[^\s.=,@]+)\.)?(?P<metric>\w+)\s*=\s*(?P<number>\d+\.?\d*)(?P<unit>us|ms|s|min)"
).fullmatch
_read_share = re.compile(r"(?P<number>\d+\.?\d*)\s*%").fullmatch
_RIGHT = "ttft=200ms,itl=50ms@99%, or memory.ttft=5ms for one outcome"


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that a metric of a request may be.

    Attributes:
        metric: `ttft`, `e2e`, `tpot`, or `itl`, which each single gap has to keep.
        limit_s: seconds.
        outcome: whose requests it binds; None binds all.
    """

    metric: str
    limit_s: float
    outcome: str | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """Limits that a request keeps together, and the share of requests that has to.

    Attributes:
        text: as it was given.
    """

    text: str
    limits: tuple[Limit, ...]
    share: float

    def keeps(self, records: Records, *, open_loop: bool) -> NDArray[np.bool_]:
        """Return which requests keep all limits; those that failed never do.

        In an open loop `ttft` and `e2e` count from when a request was due, as its user does.
        As in vLLM's goodput, a TPOT that isn't defined keeps its limit.
        """
        since = records.due if open_loop else records.sent
        kept = answered(records)
        for limit in self.limits:
            if limit.metric == "itl":
                fits = ~(records.longest_gap > limit.limit_s)
            elif limit.metric == "tpot":
                fits = ~(time_per_token(records) > limit.limit_s)
            else:
                at = first_token(records) if limit.metric == "ttft" else last_token(records)
                fits = at - since <= limit.limit_s
            if limit.outcome is not None:
                fits |= ~_has_outcome(records, limit.outcome)
            kept &= fits
        return kept

    def attainment(self, records: Records, elapsed_s: float, *, open_loop: bool) -> dict[str, Any]:
        """Return how many requests keep the limits, whole and by outcome.

        Requests that the end of the run cut count neither way. `holds` is of these requests;
        `interval` (Wilson's, 95%) says what is known of all that there could be. `unseen` names
        outcomes whose limits bound nothing.
        """
        judged = records.failure != Failure.INTERRUPTED
        kept = self.keeps(records, open_loop=open_loop)
        whole = _share(kept[judged], self.share, elapsed_s)
        outcomes = {
            name: _share(kept[rows], self.share, elapsed_s)
            for name in records.outcomes
            if (rows := judged & _has_outcome(records, name)).any()
        }
        named = dict.fromkeys(limit.outcome for limit in self.limits if limit.outcome is not None)
        return {
            "objective": self.text,
            "share": self.share,
            **whole,
            "outcomes": outcomes,
            "unseen": [name for name in named if name not in outcomes],
        }


def _has_outcome(records: Records, name: str) -> NDArray[np.bool_]:
    number = records.outcomes.index(name) if name in records.outcomes else -1
    found: NDArray[np.bool_] = records.outcome == number
    return found


def _share(kept: NDArray[np.bool_], wanted: float, elapsed_s: float) -> dict[str, Any]:
    good, count = int(kept.sum()), len(kept)
    interval = wilson(good, count)
    return {
        "requests": count,
        "good": good,
        "attainment": good / count if count else 0.0,
        "interval": list(interval),
        "holds": count > 0 and good >= wanted * count - 1e-9,
        "requests_per_s": good / elapsed_s if elapsed_s else 0.0,
    }


def parse(text: str, outcomes: Sequence[str] | None = None) -> Objective:
    """Return the objective that a text such as `ttft=200ms,memory.e2e=5ms@99%` means.

    Without `@` it is of 99% of requests.

    Args:
        text: as it was given.
        outcomes: names that there are; None allows any.

    Raises:
        ConfigError: the text isn't an objective.
    """
    limits_text, at, share_text = text.partition("@")
    share = _parse_share(share_text.strip()) if at else 0.99
    limits = tuple(_parse_limit(part.strip()) for part in limits_text.split(","))
    named = [(limit.outcome, limit.metric) for limit in limits]
    if len(set(named)) < len(named):
        raise ConfigError([f"--objective: should limit each metric once, not as {text!r}"])
    for name in (limit.outcome for limit in limits):
        if outcomes is not None and name is not None and name not in outcomes:
            known = ", ".join(outcomes)
            raise ConfigError([f"--objective: should limit one of {known}, not {name!r}"])
    return Objective(text, limits, share)


def _parse_share(text: str) -> float:
    found = _read_share(text)
    if found is None or not 0 < float(found["number"]) < 100:
        message = f"should end in a share above 0% and below 100%, such as @99%, not @{text}"
        raise ConfigError([f"--objective: {message}"])
    return float(found["number"]) / 100


def _parse_limit(text: str) -> Limit:
    found = _read_limit(text)
    if found is None:
        raise ConfigError([f"--objective: should be such as {_RIGHT}; {text!r} can't be read"])
    if found["metric"] not in METRICS:
        known = ", ".join(METRICS)
        message = f"should limit one of {known}, not {found['metric']!r}, such as {_RIGHT}"
        raise ConfigError([f"--objective: {message}"])
    limit_s = float(found["number"]) * _UNITS[found["unit"]]
    if limit_s <= 0:
        raise ConfigError([f"--objective: should have limits above 0, not {text!r}"])
    return Limit(found["metric"], limit_s, found["outcome"])
