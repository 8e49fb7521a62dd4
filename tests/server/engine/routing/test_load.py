"""What an upstream has to do, as far as it can be told from lengths and answers."""

import pytest

from server.auth.limits import Limits, LocalUsage
from server.engine.routing.load import Estimate, UpstreamLoad

MANY = Limits(max_requests=100)


def test_a_request_counts_from_its_beginning_to_its_end() -> None:
    load = UpstreamLoad(LocalUsage(), MANY, Estimate())
    assert load.begin(1000.0)
    assert load.begin(0.1)
    assert (load.tokens, load.active, load.in_flight) == (1000.1, 2, 2)
    load.end(1000.0)
    load.end(0.1)
    assert (load.tokens, load.active, load.in_flight) == (0, 0, 0)
    assert load.counts.requests == 2


def test_each_has_its_own_limit() -> None:
    load = UpstreamLoad(LocalUsage(), Limits(max_requests=1), Estimate())
    assert load.begin(1.0)
    assert not load.begin(1.0)
    assert load.counts.requests == 1
    load.end(1.0)
    assert load.begin(1.0)


def test_requests_of_other_processes_count_as_average_ones() -> None:
    usage, estimate = LocalUsage(), Estimate()
    one, other = (UpstreamLoad(usage, MANY, estimate) for _ in range(2))
    one.begin(1000.0)
    other.begin(5.0)
    assert one.tokens == 1000 + estimate.mean
    assert other.tokens == 5 + estimate.mean
    assert one.in_flight == 2


def test_what_is_known_of_a_prompt_costs_nothing() -> None:
    estimate = Estimate()
    whole, known = estimate.tokens(4000, 0), estimate.tokens(4000, 3600)
    assert whole - known == pytest.approx(900)


def test_an_estimate_follows_answers() -> None:
    estimate = Estimate()
    for _ in range(300):
        estimate.learn(4000, 0, 2000, None)
    assert estimate.tokens_in(1000) == pytest.approx(500, rel=0.01)
    before = estimate.tokens(4000, 4000)
    for _ in range(300):
        # The engine finds nothing of what it should know.
        estimate.learn(4000, 4000, 2000, 0)
    assert estimate.tokens(4000, 4000) > before + 1900


def test_odd_counts_break_nothing() -> None:
    estimate = Estimate()
    for counts in ((0, 0, 0, 0), (10, 10, 0, 10**9), (1, 0, 10**9, None), (0, 5, 5, 5)):
        estimate.learn(*counts)
    assert 0 < estimate.tokens(100, 0) < 1e6
    assert estimate.tokens(10**12, 0) < 1e6
