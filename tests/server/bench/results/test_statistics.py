from fractions import Fraction
from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.results.statistics import QUANTILES, is_too_few, quantile_ranks, summarize, wilson


def exact_mass(count, p, below):
    """P(B < below) of a binomial, exactly."""
    p = Fraction(p)
    return sum(comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(below))


@given(st.integers(1, 120), st.sampled_from(["1/2", "9/10", "99/100"]))
def test_ranks_enclose_a_quantile_as_often_as_the_binomial_says(count, text):
    p = Fraction(text)
    ranks = quantile_ranks(count, float(p))
    tail = Fraction(25, 1000)
    if ranks is None:
        cannot_be_below = exact_mass(count, p, 1) > tail
        cannot_be_above = 1 - exact_mass(count, p, count) > tail
        assert cannot_be_below or cannot_be_above
        return
    low, high = ranks[0] + 1, ranks[1] + 1
    assert exact_mass(count, p, low) <= tail < exact_mass(count, p, low + 1)
    assert 1 - exact_mass(count, p, high) <= tail < 1 - exact_mass(count, p, high - 1)


@pytest.mark.parametrize("p", QUANTILES.values())
def test_ranks_of_a_million_values_are_those_of_the_normal_limit(p):
    count = 1_000_000
    low, high = quantile_ranks(count, p)
    reach = 1.959964 * sqrt(count * p * (1 - p))
    assert low == pytest.approx(count * p - reach, abs=2 + reach / 50)
    assert high == pytest.approx(count * p + reach, abs=2 + reach / 50)


def test_intervals_contain_the_true_quantile_in_95_of_100_samples():
    random = np.random.default_rng(1)
    found = 0
    for _ in range(400):
        low, high = summarize(random.exponential(size=300))["ci"]["p90"]
        found += low <= -np.log(0.1) <= high
    assert 0.93 < found / 400 < 0.985


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=60))
def test_a_summary_has_numpys_figures(values):
    values = np.array(values)
    found = summarize(values)
    assert found["count"] == len(values)
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values), abs=1e-9)
    for name, p in QUANTILES.items():
        assert found[name] == pytest.approx(np.percentile(values, p * 100))
        if name in found["ci"]:
            assert found["ci"][name][0] <= found[name] <= found["ci"][name][1]


def test_there_is_no_summary_of_nothing():
    assert summarize(np.array([])) is None


def test_ten_values_have_to_lie_beyond_a_percentile():
    assert not is_too_few(1000, 0.99)
    assert is_too_few(999, 0.99)
    assert summarize(np.arange(1000.0))["too_few"] == ["p99.9"]


@given(st.integers(0, 500), st.integers(1, 500))
def test_wilsons_bounds_solve_its_equation(successes, count):
    successes = min(successes, count)
    share, z = successes / count, 1.959963984540054
    low, high = wilson(successes, count)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        spread = z * sqrt(bound * (1 - bound) / count)
        assert abs(share - bound) == pytest.approx(spread, abs=1e-7)


def test_nothing_is_known_of_no_trials():
    assert wilson(0, 0) == (0.0, 1.0)
