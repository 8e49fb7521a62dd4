"""Schedules against closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.clients.schedule import due_times, thinking_s
from server.bench.load import Load
from server.config.base import ConfigError

from .workloads_of_tests import Numbered

RATES = st.floats(0.5, 500)
SEEDS = st.integers(0, 2**63)


@given(RATES, st.integers(1, 2000))
def test_constant_gaps(rate, sessions) -> None:
    times = due_times(Load(rate=rate, arrivals="constant", sessions=sessions), Numbered())
    np.testing.assert_allclose(times, np.arange(sessions) / rate)


@given(RATES, SEEDS, st.floats(0.1, 20))
def test_mean_and_variance_of_random_gaps(rate, seed, burstiness) -> None:
    count = 20_000
    load = Load(rate=rate, arrivals="gamma", burstiness=burstiness, sessions=count, seed=seed)
    times = due_times(load, Numbered())
    gaps = np.diff(times, prepend=0)
    # Of a gamma distribution: the deviation of a mean, and of a variance (kurtosis 3 + 6/shape).
    deviation = 1 / (rate * math.sqrt(burstiness))
    assert abs(gaps.mean() - 1 / rate) < 6 * deviation / math.sqrt(count)
    spread = deviation**2 * math.sqrt((2 + 6 / burstiness) / count)
    assert abs(gaps.var() - deviation**2) < 8 * spread


@given(RATES, SEEDS, st.floats(1, 50))
def test_as_many_arrivals_as_poisson_says(rate, seed, duration_s) -> None:
    times = due_times(Load(rate=rate, duration_s=duration_s, seed=seed), Numbered())
    expected = rate * duration_s
    assert abs(len(times) - expected) < 7 * math.sqrt(expected) + 7
    assert (np.diff(times) >= 0).all()
    assert len(times) == 0 or times[-1] < duration_s


@given(SEEDS, st.floats(0.2, 5), st.floats(1, 20), st.floats(1, 20))
def test_a_shorter_run_begins_as_a_longer_one(seed, burstiness, one, other) -> None:
    def times(duration_s):
        load = Load(rate=30, arrivals="gamma", burstiness=burstiness, seed=seed,
                    duration_s=duration_s)  # fmt: skip
        return due_times(load, Numbered())

    shorter, longer = times(min(one, other)), times(max(one, other))
    np.testing.assert_array_equal(shorter, longer[: len(shorter)])


def test_gamma_of_one_is_poisson() -> None:
    gamma = Load(rate=10, arrivals="gamma", sessions=100, seed=4)
    poisson = Load(rate=10, arrivals="poisson", burstiness=9, sessions=100, seed=4)
    assert (due_times(gamma, Numbered()) == due_times(poisson, Numbered())).all()
    other = Load(rate=10, arrivals="poisson", sessions=100, seed=5)
    assert (due_times(other, Numbered()) != due_times(poisson, Numbered())).all()


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
@pytest.mark.parametrize("bound", [{"duration_s": 1000}, {"sessions": 1000}])
def test_a_workload_may_have_fewer_sessions(arrivals, bound) -> None:
    load = Load(rate=10, arrivals=arrivals, **bound)
    assert len(due_times(load, Numbered(count=7))) == 7


def test_no_sessions() -> None:
    assert len(due_times(Load(rate=10, sessions=5), Numbered(count=0))) == 0


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50).map(sorted), st.floats(0.1, 50))
def test_a_trace_has_its_own_times(at, speed) -> None:
    workload = Numbered(count=len(at), at=at)
    whole = due_times(Load(arrivals="trace", speed=speed, sessions=1000), workload)
    np.testing.assert_allclose(whole, np.array(at) / speed)
    part = due_times(Load(arrivals="trace", speed=speed, duration_s=10), workload)
    assert list(part) == [time for time in whole if time < 10]


def test_a_trace_of_unknown_length_is_read_as_far_as_needed() -> None:
    class Endless(Numbered):
        def times(self, count):
            return [number / 100 for number in range(count)]

    assert len(due_times(Load(arrivals="trace", duration_s=500), Endless())) == 50_000
    assert len(due_times(Load(arrivals="trace", sessions=3000), Endless())) == 3000


@pytest.mark.parametrize(
    ("load", "text"),
    [
        ({"rate": 0}, "--rate: should be greater than 0, not 0"),
        ({"rate": math.inf}, "--rate"),
        ({}, "--rate"),
        ({"rate": 1, "arrivals": "gamma", "burstiness": -1}, "--burstiness: .* not -1"),
        ({"arrivals": "trace", "speed": 0}, "--speed: should be greater than 0"),
        ({"arrivals": "trace"}, "--arrivals: .*times of their own; numbered has none"),
        ({"rate": 1e9}, "--rate: should make at most 20000000 sessions"),
    ],
)
def test_what_cannot_be(load, text) -> None:
    with pytest.raises(ConfigError, match=text):
        due_times(Load(**load, duration_s=60), Numbered())


def test_thinking_is_exponential() -> None:
    load = Load(users=1, think_s=3, seed=1)
    thought = np.array([thinking_s(load, number) for number in range(20_000)])
    assert thought.mean() == pytest.approx(3, rel=0.05)
    assert thought.std() == pytest.approx(3, rel=0.05)
    assert (thought > 3).mean() == pytest.approx(math.exp(-1), abs=0.02)
    assert thinking_s(Load(users=1), 5) == 0
