from math import exp, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.results.resample import (
    combined_interval,
    make_blocks,
    mean_interval,
    ratio_interval,
    resample,
)
from server.bench.results.statistics import QUANTILES


@given(st.lists(st.floats(0.001, 1e3), min_size=1, max_size=200))
def test_each_block_drawn_once_gives_the_sample_itself(values):
    values = np.array(values)
    found = resample(values, np.zeros(len(values), dtype=np.int64), np.ones((1, 1)))
    assert found["mean"][0] == pytest.approx(values.mean())
    for name, p in QUANTILES.items():
        assert found[name][0] == pytest.approx(np.quantile(values, p))


@pytest.mark.parametrize("count", [5_000, 200_000])
def test_many_values_are_counted_in_cells_without_losing_much(count):
    values = np.random.default_rng(3).exponential(size=count)
    found = resample(values, np.zeros(count, dtype=np.int64), np.ones((1, 1)))
    for name, p in QUANTILES.items():
        assert found[name][0] == pytest.approx(np.quantile(values, p), rel=5e-3)


@given(st.lists(st.integers(0, 5), min_size=3, max_size=3), st.integers(0, 2**32))
def test_a_block_drawn_twice_counts_twice(weights, seed):
    random = np.random.default_rng(seed)
    values, blocks = random.random(30), random.integers(0, 3, 30)
    found = resample(values, blocks, np.array([weights], dtype=np.float64))
    drawn = np.repeat(values, np.array(weights)[blocks])
    if not len(drawn):
        assert np.isnan(found["p50"][0])
        assert np.isnan(found["mean"][0])
        return
    assert found["mean"][0] == pytest.approx(drawn.mean())
    middle = found["p50"][0]
    assert (drawn < middle).mean() <= 0.5 + max(weights) / len(drawn)
    assert (drawn > middle).mean() <= 0.5 + max(weights) / len(drawn)


def test_both_runs_share_blocks_of_neighbouring_sessions():
    first, second = np.arange(1000), np.arange(500, 2000)
    blocks = make_blocks(first, second)
    assert blocks.weights.shape == (1000, 200)
    assert (blocks.weights.sum(axis=1) == 200).all()
    assert (np.diff(blocks.of_a) >= 0).all()
    assert (blocks.of_a[500:] == blocks.of_b[:500]).all()
    few = make_blocks(np.array([3, 9, 3]), np.array([9]))
    assert (few.of_a.tolist(), few.of_b.tolist()) == ([0, 1, 0], [1])


def test_intervals_contain_the_true_ratio_in_95_of_100_comparisons():
    random = np.random.default_rng(5)
    sessions = np.arange(400)
    blocks = make_blocks(sessions, sessions)
    weights = blocks.weights[:200]
    found = 0
    for _ in range(40):
        a, b = random.exponential(1, 400), random.exponential(1.5, 400)
        of_a = resample(a, blocks.of_a, weights)
        of_b = resample(b, blocks.of_b, weights)
        low, high = ratio_interval(of_a["p50"], of_b["p50"])
        found += low <= 1.5 <= high
    assert 0.85 < found / 40 <= 1


def test_sessions_that_are_slow_in_both_runs_make_the_interval_narrow():
    """The pairing: what differs by session, and not by run, is no uncertainty of the ratio."""
    random = np.random.default_rng(6)
    sessions = np.arange(200)
    of_session = random.exponential(size=200)
    blocks = make_blocks(sessions, sessions)
    of_a = resample(of_session, blocks.of_a, blocks.weights)["mean"]
    of_b = resample(of_session * 1.1, blocks.of_b, blocks.weights)["mean"]
    low, high = ratio_interval(of_a, of_b)
    assert (low, high) == (pytest.approx(1.1), pytest.approx(1.1))


def test_there_is_no_interval_where_resamples_lack_values():
    assert ratio_interval(np.array([np.nan, 1.0]), np.array([1.0, 1.0])) is None


def test_stored_intervals_combine_as_those_of_logarithms():
    a, b = (exp(0.0), (exp(-0.1), exp(0.1))), (exp(0.5), (exp(0.4), exp(0.6)))
    low, high = combined_interval(*a, *b)
    assert low == pytest.approx(exp(0.5 - 0.1 * sqrt(2)))
    assert high == pytest.approx(exp(0.5 + 0.1 * sqrt(2)))
    assert combined_interval(0.0, (0.0, 1.0), *b) is None


def test_a_means_interval_is_that_of_the_normal_limit():
    assert mean_interval({"mean": 5.0, "std": 2.0, "count": 400}) == (
        pytest.approx(4.804), pytest.approx(5.196),
    )  # fmt: skip
