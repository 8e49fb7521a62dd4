"""The contract that every policy keeps, and what is special about each."""

import random
from collections.abc import Callable
from fractions import Fraction
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiers.policies.replay import (
    SEED_EXAMPLE,
    Replay,
    count_hits,
    count_hits_of_optimum,
    count_most_hits,
    expect_hits_of_random,
)
from tiers.policies import (
    ARC,
    DEFAULT_POLICY,
    FIFO,
    LFU,
    LRU,
    POLICIES,
    S3FIFO,
    SIEVE,
    Policy,
    WTinyLFU,
)

MAX_BYTES = 100
EVERY = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES.keys())
Make = Callable[[int], Policy]

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "remove", "victim", "evict"]),
        st.integers(0, 15).map(str),
        st.integers(1, MAX_BYTES),
    ),
    max_size=200,
)


@EVERY
@given(STEPS)
def test_keeps_its_contract(make: Make, steps: list[tuple[str, str, int]]) -> None:
    policy, held = make(MAX_BYTES), {}

    def evict() -> None:
        announced = policy.victim()
        assert announced == policy.victim()
        assert policy.evict() == announced
        del held[announced]

    for action, key, size in steps:
        if action == "ask" and key in held:
            policy.access(key)
        elif action == "ask":
            policy.insert(key, size)
            held[key] = size
        elif action == "remove" and key in held:
            policy.remove(key)
            del held[key]
        elif action == "evict" and held:
            evict()
        elif action == "victim":
            assert policy.victim() in held if held else policy.victim() is None
        while sum(held.values()) > MAX_BYTES:
            evict()
    while held:
        evict()
    assert policy.victim() is None


@EVERY
@given(STEPS, st.lists(st.integers(1, MAX_BYTES), min_size=1))
def test_keeps_its_contract_when_it_is_resized(
    make: Make, steps: list[tuple[str, str, int]], sizes: list[int]
) -> None:
    policy, held, room = make(MAX_BYTES), {}, MAX_BYTES
    for (_, key, size), max_bytes in zip(steps, cycle(sizes), strict=False):
        policy.resize(max_bytes)
        if key in held:
            policy.access(key)
        elif size <= max_bytes:
            policy.insert(key, size)
            held[key] = size
        # What is too much leaves by and by.
        room = max(max_bytes, room - MAX_BYTES // 8)
        while sum(held.values()) > room:
            del held[policy.evict()]
    while held:
        del held[policy.evict()]
    assert policy.victim() is None


@EVERY
def test_refuses_to_evict_nothing(make: Make) -> None:
    with pytest.raises(KeyError):
        make(MAX_BYTES).evict()


@EVERY
def test_forgets_what_it_forgot(make: Make) -> None:
    policy = make(10)
    random_keys = random.Random(1)
    count_hits(policy, (str(random_keys.randrange(1000)) for _ in range(5000)))
    remembered = sum(len(value) for value in vars(policy).values() if isinstance(value, dict))
    assert remembered <= 3 * 10 + 1


@EVERY
def test_knows_every_policy_by_name(make: type[Policy]) -> None:
    assert POLICIES[make.NAME] is make
    assert DEFAULT_POLICY in POLICIES


@pytest.mark.parametrize("capacity", [3, 5, 7])
def test_seed_example(capacity: int) -> None:
    hits = [count_hits(make(capacity), SEED_EXAMPLE) for make in (FIFO, LRU, LFU)]
    mean = expect_hits_of_random(capacity, SEED_EXAMPLE)
    optimum = count_hits_of_optimum(capacity, SEED_EXAMPLE)
    assert hits == [{3: 0, 5: 1, 7: 3}[capacity]] * 3
    assert mean == {3: Fraction(505, 729), 5: Fraction(278, 125), 7: 3}[capacity]
    assert optimum == {3: 2, 5: 3, 7: 3}[capacity]
    assert count_most_hits(capacity, SEED_EXAMPLE) == 3
    row = (capacity, *hits, f"{float(mean):.2f}", optimum)
    assert f"| {' | '.join(map(str, row))} |\n" in Path("scripts/README.md").read_text()


def zipf(requests: int, keys: int, exponent: float = 0.9) -> list[str]:
    weights = [1 / (rank + 1) ** exponent for rank in range(keys)]
    return [str(key) for key in random.Random(7).choices(range(keys), weights, k=requests)]


@pytest.mark.parametrize(
    ("name", "make", "tolerance"),
    [("LRU", LRU, 0), ("FIFO", FIFO, 0), ("Sieve", SIEVE, 0), ("S3FIFO", S3FIFO, 0.02),
     ("ARC", ARC, 0.04)],
)  # fmt: skip
@pytest.mark.parametrize("capacity", [50, 200])
def test_agrees_with_libcachesim(name: str, make: Make, tolerance: float, capacity: int) -> None:
    libcachesim = pytest.importorskip("libcachesim")
    trace = zipf(10_000, 1000)
    reference = getattr(libcachesim, name)(cache_size=capacity, hashpower=12)
    request = libcachesim.Request()
    expected = 0
    for key in trace:
        request.obj_id, request.obj_size = int(key) + 1, 1
        expected += reference.get(request)
    # As much as an answer costs: what remembers ghosts is as large as the cache asks for.
    hits = count_hits(make(capacity * 1024), trace, cost=1024)
    assert hits == pytest.approx(expected, rel=tolerance, abs=0)


@pytest.mark.parametrize(("name", "make"), [("LRU", LRU), ("FIFO", FIFO), ("LFU", LFU)])
def test_seed_example_agrees_with_libcachesim(name: str, make: Make) -> None:
    libcachesim = pytest.importorskip("libcachesim")
    for capacity in (3, 5, 7):
        reference = getattr(libcachesim, name)(cache_size=capacity, hashpower=8)
        request = libcachesim.Request()
        expected = 0
        for key in SEED_EXAMPLE:
            request.obj_id, request.obj_size = int(key), 1
            expected += reference.get(request)
        assert count_hits(make(capacity), SEED_EXAMPLE) == expected


def test_lru_and_fifo_differ_by_what_a_hit_does() -> None:
    for policy, leaves in ((LRU(3), "b"), (FIFO(3), "a")):
        count_hits(policy, "abca")
        assert policy.victim() == leaves


def test_lfu_breaks_ties_by_recency_and_ages() -> None:
    replay = Replay(LFU(3))
    replay.ask("aabbcca")
    assert replay.policy.victim() == "b"
    replay.ask(str(number) for number in range(20))
    assert not replay.held & set("abc")


def test_lfu_finds_its_victim_among_few_ranks() -> None:
    policy = LFU(3)
    policy.insert("a", 1)
    for _ in range(1000):
        policy.access("a")
    assert max(policy._by_rank) <= 256
    assert policy.victim() == "a"


def test_sieve_spares_what_was_visited_and_keeps_its_hand() -> None:
    replay = Replay(SIEVE(3))
    replay.ask("abcab")
    left = []
    for key in "defghi":
        before = set(replay.held)
        replay.ask(key)
        left += before - replay.held
    # Once the hand has passed the visited a and b, they wait until it comes round again.
    assert left == ["c", "a", "b", "d", "e", "f"]


def test_s3fifo_readmits_a_ghost_to_the_main_queue() -> None:
    replay = Replay(S3FIFO(10))
    replay.ask(str(number) for number in range(12))
    assert "0" not in replay.held
    replay.ask("0")
    replay.ask(f"scan{number}" for number in range(50))
    assert "0" in replay.held


def test_wtinylfu_does_not_admit_what_is_rarer() -> None:
    replay = Replay(WTinyLFU(100))
    popular = {str(number) for number in range(99)}
    replay.ask(sorted(popular) * 5)
    replay.ask(f"scan{number}" for number in range(200))
    assert len(popular & replay.held) >= 95


def test_wtinylfu_widens_its_window_where_recency_pays() -> None:
    policy = WTinyLFU(256)
    # Every other request is for one of the last 50 new keys, soon forgotten.
    ago = random.Random(1)
    now_or_before = (now - now % 2 * ago.randrange(1, 100, 2) for now in range(60_000))
    count_hits(policy, map(str, now_or_before))
    assert policy._window_target > 0.3 * policy.max_bytes


def test_arc_keeps_favourites_through_a_scan() -> None:
    replay = Replay(ARC(100))
    favourites = {str(number) for number in range(40)}
    replay.ask(sorted(favourites) * 2)
    replay.ask(f"scan{number}" for number in range(1000))
    assert favourites <= replay.held


def test_arc_gives_room_to_the_list_whose_ghosts_return() -> None:
    policy = ARC(100)
    replay = Replay(policy)
    replay.ask(["a", "b", "a", "b"])
    first = policy._recent_target
    replay.ask(str(number) for number in range(200))
    # What was asked for once and evicted last returns: a longer once-list would have held it.
    replay.ask(str(100 + number) for number in range(2))
    assert policy._recent_target > first


ago = random.Random(1)
TRACES = {
    "recency": [str(now - (now + 1) % 2 * ago.randrange(1, 100)) for now in range(20_000)],
    "favourites": [str(now % 32 if now % 3 == 0 else now) for now in range(20_000)],
    "zipf": zipf(20_000, 5000),
}


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("capacity", [64, 256, 1024])
def test_arc_finds_as_much_as_lru_in_caches_of_64_entries_and_more(
    trace: str, capacity: int
) -> None:
    """In smaller caches few ghosts return, so what ARC learns is chance, and LRU may find more."""
    arc, lru = (count_hits(make(capacity * 1024), TRACES[trace], cost=1024) for make in (ARC, LRU))
    assert arc >= 0.999 * lru
