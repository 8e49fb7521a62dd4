"""In which order upstreams are tried: what holds for all beginnings and loads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.routing.choice import (
    MARGIN_TOKENS,
    SPREAD,
    Beginnings,
    Preference,
    Rotation,
    bound_of,
    by_load,
    within_bound,
)
from tests.server.engine.routing.fleet_of_engines import (
    by_least,
    by_prefix,
    in_turn,
    mooncake,
    oracle,
    serve,
)

DIGESTS = st.integers(0, 2**64 - 1)
NAMES = [f"http://engine-{number}:8000" for number in range(8)]
LOADS = st.lists(st.floats(0, 1e6), min_size=1, max_size=8)


def first_ready(preference: Preference, ready: list[int]) -> int:
    return within_bound(preference, ready, [0.0] * len(NAMES), 0).order[0]


@given(st.lists(DIGESTS, min_size=1, max_size=5), st.integers(0, 7))
def test_an_upstream_that_leaves_moves_its_share_alone(digests: list[int], gone: int) -> None:
    preference = Beginnings().prefer(digests, NAMES)
    everyone, others = [*range(8)], [number for number in range(8) if number != gone]
    before = first_ready(preference, everyone)
    if before != gone:
        assert first_ready(preference, others) == before


def test_the_share_of_one_that_leaves_is_spread_over_all_others() -> None:
    known = Beginnings()
    others = [*range(1, 8)]
    orders = [known.prefer([digest * 0x9E3779B97F4A7C15 % 2**64], NAMES) for digest in range(4000)]
    moved = [first_ready(each, others) for each in orders if each.order[0] == 0]
    assert 400 < len(moved) < 600
    assert all(40 < moved.count(number) < 110 for number in others)


@given(st.lists(st.lists(DIGESTS, min_size=1, max_size=4, unique=True), max_size=9), DIGESTS)
def test_processes_agree(asked: list[list[int]], digest: int) -> None:
    one, other = Beginnings(), Beginnings()
    for each in asked:
        one.count(each)
    # Another process has seen nothing of it. What is hot may have a larger group in one of them.
    assert one.prefer([digest], NAMES).order == other.prefer([digest], NAMES).order


@given(LOADS, st.data())
def test_load_stays_within_the_bound(loads: list[float], data: st.DataObject) -> None:
    numbers = [*range(len(loads))]
    ready = data.draw(st.lists(st.sampled_from(numbers), min_size=1, unique=True))
    order = tuple(data.draw(st.permutations(numbers)))
    preference = Preference(order, data.draw(st.integers(1, len(numbers))))
    tokens = data.draw(st.floats(0, 1e5))
    choice = within_bound(preference, ready, loads, tokens)
    assert sorted(choice.order) == sorted(ready)
    of_ready = [loads[number] for number in ready]
    assert loads[choice.order[0]] <= bound_of(of_ready, tokens)


@given(st.lists(st.tuples(DIGESTS, st.integers(1, 20_000)), min_size=1, max_size=200))
def test_requests_that_never_end_stay_spread(asked: list[tuple[int, int]]) -> None:
    known, loads = Beginnings(), [0.0] * 4
    for digest, tokens in asked:
        chosen = within_bound(known.prefer([digest], NAMES[:4]), range(4), loads, 0).order[0]
        loads[chosen] += tokens
    mean = sum(loads) / 4
    assert max(loads) <= max(SPREAD * mean, mean + MARGIN_TOKENS) + 20_000


def test_the_shortest_beginning_decides() -> None:
    known = Beginnings()
    turns = [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    orders = []
    for turn in turns:
        orders.append(known.prefer(turn, NAMES).order[0])
        known.count(turn)
    assert len(set(orders)) == 1


def test_a_beginning_of_all_requests_is_narrowed_by_the_next() -> None:
    known = Beginnings()
    for number in range(1000):
        known.count((1, 100 + number % 50))
    chosen = [known.prefer((1, 100 + number), NAMES).order[0] for number in range(50)]
    assert len(set(chosen)) >= 6
    assert known.prefer((1,), NAMES).group == 8


def test_a_beginning_has_as_many_upstreams_as_its_share_needs() -> None:
    known = Beginnings()
    for number in range(1200):
        known.count((1,) if number % 6 == 0 else (1000 + number,))
    # A sixth of the requests: more than one of eight can take.
    preference = known.prefer((1,), NAMES)
    assert preference.group == 2
    assert preference.order[:2] == Beginnings().prefer((1,), NAMES).order[:2]
    loads = [0.0] * 8
    loads[preference.order[0]] = 1.0
    choice = within_bound(preference, range(8), loads, 0)
    assert (choice.order[0], choice.is_overflow) == (preference.order[1], False)


def test_shares_follow_what_is_asked_now() -> None:
    known = Beginnings()
    for _ in range(5000):
        known.count((1,))
    assert known.prefer((1,), NAMES).group == 8
    for number in range(40_000):
        known.count((100 + number,))
    assert known.prefer((1,), NAMES).group == 1


def test_one_above_the_bound_is_passed_over_for_the_next() -> None:
    preference = Preference((2, 0, 1), 1)
    full = [0.0, 0.0, 100_000.0]
    assert within_bound(preference, range(3), full, 0) == ([0, 1, 2], True)
    # Elsewhere its prompt would cost more than it has to wait.
    assert within_bound(preference, range(3), full, 12_000) == ([2, 0, 1], False)
    # One that isn't there is no overflow.
    assert within_bound(preference, [0, 1], full, 0) == ([0, 1], False)


def test_least_and_turns() -> None:
    rotation = Rotation()
    assert [rotation.next([3, 5, 7]) for _ in range(4)] == [
        [3, 5, 7],
        [5, 7, 3],
        [7, 3, 5],
        [3, 5, 7],
    ]
    assert by_load([3, 1, 0], [2.0, 1.0, 0.0, 1.0]) == [3, 1, 0]


HOT = [{}, {"shared_blocks": 4}, {"shared_blocks": 16}, {"hot_every": 3}]


@pytest.mark.parametrize("engines", [2, 4, 8])
@pytest.mark.parametrize("hot", HOT, ids=str)
def test_engines_find_what_they_would_find_as_one(engines: int, hot: dict[str, int]) -> None:
    prompts = mooncake(6 * engines, engines, **hot)
    best = oracle(prompts, engines)
    for processes in (1, 4):
        prefix = serve(prompts, engines, by_prefix(engines, processes))
        assert prefix.hit_ratio > best - 0.05
        assert prefix.imbalance < 1.3
    others = [serve(prompts, engines, by(engines)) for by in (by_least, in_turn)]
    assert all(prefix.hit_ratio > other.hit_ratio + 0.1 for other in others)


@pytest.mark.parametrize("engines", [4, 8])
@pytest.mark.parametrize("slow", [1.0, 0.5])
def test_an_engine_that_dies_or_is_slow_costs_no_more_than_its_part(
    engines: int, slow: float
) -> None:
    prompts = mooncake(6 * engines, engines)
    # It comes back with an empty cache.
    dead = range(len(prompts) // 3, len(prompts) // 2) if slow == 1 else range(0)
    prefix, *others = (
        serve(prompts, engines, by(engines), dead=dead, slow=slow)
        for by in (by_prefix, by_least, in_turn)
    )
    assert prefix.hit_ratio > oracle(prompts, engines) - 0.5 / engines
    assert prefix.imbalance < 1.3
    assert all(prefix.mean_s < other.mean_s / 2 for other in others)


@pytest.mark.parametrize("engines", [4, 8])
def test_fronts_that_read_queues_know_what_others_have_sent(engines: int) -> None:
    prompts = mooncake(6 * engines, engines, shared_blocks=16)
    alone, reading = (
        serve(prompts, engines, by_prefix(engines, 4), 4, reads_queues=reads)
        for reads in (False, True)
    )
    assert reading.imbalance < 1.3 < alone.imbalance
    assert reading.hit_ratio > alone.hit_ratio - 0.02
