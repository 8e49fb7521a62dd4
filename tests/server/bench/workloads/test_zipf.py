"""Zipf's law: ranks are as frequent as the closed form says, whatever the session."""

from collections import Counter
from itertools import accumulate
from math import fsum, sqrt

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.workloads.zipf import rank_at
from tests.server.bench.workloads.asked import bodies, made, prompts

SESSIONS = 3000


def probabilities(s: float, count: int) -> list[float]:
    weights = [rank**-s for rank in range(1, count + 1)]
    return [weight / fsum(weights) for weight in weights]


@given(st.floats(0, 4), st.integers(1, 500), st.floats(0, 1))
def test_a_rank_is_the_exact_inverse_of_the_distribution(s: float, count: int, drawn) -> None:
    rank = rank_at(drawn, s, count)
    summed = [0.0, *accumulate(probabilities(s, count))]
    assert 0 <= rank < count
    assert summed[rank] - 1e-9 <= drawn <= summed[rank + 1] + 1e-9


@pytest.mark.parametrize(("s", "unique"), [(0, 0), (0.7, 0.3), (1.1, 0), (2, 0.3)])
def test_frequencies_are_those_of_the_law(s: float, unique: float) -> None:
    workload = made(f"zipf:s={s},prompts=50,unique={unique}")
    times = Counter(prompts(workload, range(SESSIONS)))
    known = known_prompts(workload)
    for prompt, probability in zip(known, probabilities(s, 50), strict=True):
        expected = probability * (1 - unique)
        # Six standard deviations: more has a probability of 2e-9.
        margin = 6 * sqrt(expected * (1 - expected) / SESSIONS) + 1 / SESSIONS
        assert abs(times[prompt] / SESSIONS - expected) < margin
    unseen = [prompt for prompt, often in times.items() if prompt not in known]
    assert all(times[prompt] == 1 for prompt in unseen)
    margin = 6 * sqrt(unique * (1 - unique) / SESSIONS)
    assert abs(len(unseen) / SESSIONS - unique) <= margin


def known_prompts(workload) -> list[str]:
    return [orjson.loads(step.body)["messages"][0]["content"] for step in workload.repeated()]


def test_the_first_prompts_are_those_of_mt_bench() -> None:
    first, *_ = made("zipf").repeated()
    assert b"travel blog post about a recent trip to Hawaii" in first.body


def test_all_may_be_unseen() -> None:
    assert len(set(prompts(made("zipf:unique=1"), range(1000)))) == 1000


def test_later_sessions_have_other_unseen_prompts() -> None:
    one, other = (
        prompts(made("zipf:unique=0.5", first_session=first), range(1000)) for first in (0, 1000)
    )
    both = set(one) & set(other)
    assert both
    assert both <= {*known_prompts(made("zipf"))}
    assert prompts(made("zipf:unique=0.5"), range(1000, 2000)) == other


def test_context_makes_prompts_longer() -> None:
    plain, long = (made(spec) for spec in ("zipf", "zipf:context=100"))
    for number in range(20):
        before, _, asked = prompts(long, range(number, number + 1))[0].partition("\n\n")
        assert len(before.split()) == 100
        assert [asked] == prompts(plain, range(number, number + 1))


def test_nine_of_ten_searches_repeat() -> None:
    workload = made("search")
    warm = {step.body for step in workload.repeated()}
    assert len(warm) == 200
    hits = sum(workload.session(n).steps[0].body in warm for n in range(10_000))
    assert hits / 10_000 == pytest.approx(0.9, abs=0.02)
    assert bodies(workload.session(0))[0]["max_tokens"] == 40
    assert bodies(made("search", max_tokens=7).session(0))[0]["max_tokens"] == 7
