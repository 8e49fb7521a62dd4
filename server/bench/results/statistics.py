"""Percentiles, what they are worth, and shares with their intervals.

Quantiles are numpy's `linear`, which vLLM uses too. Their confidence intervals are pairs of order
statistics: the number of values below a quantile is binomial whatever the distribution is, so the
interval is exact, needs no resampling, and costs microseconds for a million values.
Both kinds of interval take requests for independent. Requests that queue behind one another
aren't, so the true uncertainty is larger; `compare` resamples blocks of neighbours instead.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import ceil, floor, lgamma, log, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

from server.bench.records import Floats

CONFIDENCE = 0.95
QUANTILES: Mapping[str, float] = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
FEW = 10
"""A quantile p of n values is too uncertain where fewer than so many, n(1-p), lie beyond it."""
_DEVIATIONS = 12
"""Beyond so many standard deviations a binomial has less mass than a float resolves."""


def summarize(values: Floats) -> dict[str, Any] | None:
    """Return the `DIST` of a result: moments, quantiles, their intervals, and which are too few.

    Quantiles whose interval would be unbounded have none. `std` is of the population, as vLLM's.
    Returns None if there are no values.
    """
    count = len(values)
    if count == 0:
        return None
    ordered = np.sort(values)
    intervals = {
        name: [float(ordered[ranks[0]]), float(ordered[ranks[1]])]
        for name, p in QUANTILES.items()
        if (ranks := quantile_ranks(count, p)) is not None
    }
    quantiles = np.quantile(ordered, list(QUANTILES.values()))
    return {
        "count": count,
        "mean": float(ordered.mean()),
        "std": float(ordered.std()),
        "min": float(ordered[0]),
        "max": float(ordered[-1]),
        **dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
        "ci": intervals,
        "too_few": [name for name, p in QUANTILES.items() if is_too_few(count, p)],
    }


def is_too_few(count: int, p: float) -> bool:
    """Return whether fewer than ten values lie beyond a quantile."""
    return round(count * (1 - p), 6) < FEW


@lru_cache(maxsize=256)
def quantile_ranks(count: int, p: float, confidence: float = CONFIDENCE) -> tuple[int, int] | None:
    """Return the places, from 0, of the two order statistics that enclose a quantile.

    With B ~ Binomial(count, p) values below it, the quantile is at least the l-th value with
    P(B >= l), and at most the u-th with at least P(B < u). Each side errs with at most
    (1 - confidence) / 2 (David & Nagaraja, Order Statistics, 7.1).
    Returns None where there are too few values for one of both sides.
    """
    first, masses = _binomial(count, p)
    below = np.cumsum(masses)  # P(B <= first + i)
    tail = (1 - confidence) / 2
    low = first + int(np.searchsorted(below, tail, side="right"))
    high = first + 1 + int(np.searchsorted(below, 1 - tail, side="left"))
    return (low - 1, high - 1) if low >= 1 and high <= count else None


def _binomial(count: int, p: float) -> tuple[int, Floats]:
    """Return where a binomial begins to have mass, and the masses from there on."""
    mode = min(floor((count + 1) * p), count)
    reach = ceil(_DEVIATIONS * (sqrt(count * p * (1 - p)) + 1))
    first, last = max(mode - reach, 0), min(mode + reach, count)
    at = np.arange(first, last)
    steps = np.log((count - at) / (at + 1.0)) + log(p / (1 - p))
    logs = np.concatenate(([0.0], np.cumsum(steps)))
    of_mode = (
        lgamma(count + 1) - lgamma(mode + 1) - lgamma(count - mode + 1)
        + mode * log(p) + (count - mode) * log(1 - p)
    )  # fmt: skip
    return first, np.exp(logs - logs[mode - first] + of_mode)


def wilson(successes: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's score interval of a share (JASA 22, 1927); all of [0, 1] of nothing."""
    if count == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = successes / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    reach = z * sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    low = 0.0 if successes == 0 else middle - reach
    high = 1.0 if successes == count else middle + reach
    return low, high
