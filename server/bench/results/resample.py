"""Ratios of two runs with intervals: by a bootstrap over their requests, or of stored intervals.

The bootstrap draws blocks of neighbouring sessions, the same ones of both runs: neighbours wait for
one another, and equal workloads ask the same in the same session, so neither is independent.
"""

from collections.abc import Mapping
from math import exp, log, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from server.bench.records import Floats, Integers
from server.bench.results.statistics import CONFIDENCE, QUANTILES

_MOST_BLOCKS = 200
_RESAMPLES = 1000
_CELLS = 1024
"""Values are counted in so many cells, narrow in the tails. Up to as many values have their own."""
_SEED = 15


class Interval(NamedTuple):
    """What a ratio lies between, with 95% confidence."""

    low: float
    high: float


class Blocks(NamedTuple):
    """How the rows of two runs fall into the same blocks of sessions."""

    of_a: Integers
    of_b: Integers
    weights: Floats
    """How often each resample, a row, draws each block, a column."""


def make_blocks(sessions_a: Integers, sessions_b: Integers) -> Blocks:
    """Return at most 200 blocks of neighbouring sessions, and 1,000 resamples of them."""
    sessions = np.union1d(sessions_a, sessions_b)
    count = max(min(len(sessions), _MOST_BLOCKS), 1)

    def blocks(of: Integers) -> Integers:
        return np.searchsorted(sessions, of) * count // max(len(sessions), 1)

    random = np.random.default_rng(_SEED)
    weights = random.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    return Blocks(blocks(sessions_a), blocks(sessions_b), weights.astype(np.float64))


def resample(values: Floats, blocks: Integers, weights: Floats) -> dict[str, Floats]:
    """Return mean and quantiles of all resamples; NaN of those without a value.

    A quantile interpolates between the middles of cells, where all copies of a value stand; with
    each block drawn once and no more values than cells, it is numpy's `linear`.
    """
    order = np.argsort(values)
    ordered, of_block = values[order], blocks[order]
    cells, middles = _cells(len(values))
    count = weights.shape[1]
    flat = np.bincount(of_block * len(middles) + cells, minlength=count * len(middles))
    in_cell = weights @ flat.reshape(count, len(middles)).astype(np.float64)
    below = np.cumsum(in_cell, axis=1)
    totals = below[:, -1]
    places = below - (in_cell + 1) / 2
    wanted = np.outer(totals - 1, list(QUANTILES.values()))
    grid = ordered[middles]
    quantiles = np.array([np.interp(x, xp, grid) for x, xp in zip(wanted, places, strict=True)])
    empty = totals == 0
    quantiles[empty] = np.nan
    sums = weights @ np.bincount(of_block, weights=ordered, minlength=count)
    means = np.full(len(totals), np.nan)
    np.divide(sums, totals, out=means, where=~empty)
    return {"mean": means, **dict(zip(QUANTILES, quantiles.T, strict=True))}


def _cells(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the cell of each place among sorted values, and each cell's middle place."""
    if count <= _CELLS:
        return np.arange(count), np.arange(count)
    edge = log(count)
    logits = np.linspace(-edge, edge, _CELLS + 1)
    bounds = np.unique((count / (1 + np.exp(-logits))).astype(np.int64))
    bounds[0], bounds[-1] = 0, count
    bounds = np.unique(bounds)
    cells = np.searchsorted(bounds, np.arange(count), side="right") - 1
    return cells, (bounds[:-1] + bounds[1:] - 1) // 2


def ratio_interval(of_a: Floats, of_b: Floats) -> Interval | None:
    """Return the interval of b/a over resamples; None if too many have no value."""
    usable = np.isfinite(of_a) & np.isfinite(of_b) & (of_a > 0)
    if usable.mean() < CONFIDENCE:
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(of_b[usable] / of_a[usable], (tail, 1 - tail))
    return Interval(float(low), float(high))


def combined_interval(
    a: float, interval_a: tuple[float, float], b: float, interval_b: tuple[float, float]
) -> Interval | None:
    """Return the interval of b/a from the intervals of both, which are independent.

    It recovers variances from the limits, on the scale of logarithms (MOVER; Zou & Donner,
    Statistics in Medicine 27, 2008). Returns None unless all are above 0.
    """
    if min(a, b, *interval_a, *interval_b) <= 0:
        return None
    below = log(b / interval_b[0]), log(interval_a[1] / a)
    above = log(interval_b[1] / b), log(a / interval_a[0])
    ratio = b / a
    return Interval(ratio * exp(-sqrt(_squares(below))), ratio * exp(sqrt(_squares(above))))


def _squares(values: tuple[float, float]) -> float:
    return sum(value * value for value in values)


def mean_interval(spread: Mapping[str, float]) -> tuple[float, float]:
    """Return the interval of a `DIST`'s mean, by the central limit theorem."""
    reach = 1.96 * spread["std"] / sqrt(spread["count"])
    return spread["mean"] - reach, spread["mean"] + reach
