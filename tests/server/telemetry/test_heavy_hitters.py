from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.telemetry.heavy_hitters import HeavyHitters

# Some come often, most of them once.
streams = st.lists(st.integers(0, 9) | st.integers(0, 500), max_size=400)


@given(streams, st.integers(1, 20))
def test_what_comes_often_is_counted(stream: list[int], capacity: int) -> None:
    hitters: HeavyHitters[int] = HeavyHitters(capacity)
    for key in stream:
        assert hitters.add(key, key) == key
    true, counters = Counter(stream), hitters.counters
    most = len(stream) / capacity
    assert len(counters) == min(capacity, len(true))
    assert sum(counter.count for counter in counters.values()) == len(stream)
    for key, counter in counters.items():
        assert counter.value == key
        assert counter.least <= true[key] <= counter.count
        assert counter.excess <= most
    assert all(key in counters for key, times in true.items() if times > most)


@given(streams, streams, st.integers(1, 20))
def test_what_came_earlier_counts_less(before: list[int], after: list[int], capacity: int) -> None:
    hitters: HeavyHitters[None] = HeavyHitters(capacity)
    for key in before:
        hitters.add(key, None)
    hitters.scale(0.5)
    for key in after:
        hitters.add(key, None)
    true = Counter(after)
    for key, times in Counter(before).items():
        true[key] += times / 2
    for key, counter in hitters.counters.items():
        assert counter.least <= true[key] <= counter.count
        assert counter.excess <= (len(before) / 2 + len(after)) / capacity
    counters = hitters.counters
    least = (len(before) / 2 + len(after)) / capacity
    assert all(key in counters for key, times in true.items() if times > least)


@given(st.lists(streams, min_size=1, max_size=4), st.integers(1, 20))
def test_streams_merge(parts: list[list[int]], capacity: int) -> None:
    merged: HeavyHitters[int] = HeavyHitters(capacity)
    for part in parts:
        hitters: HeavyHitters[int] = HeavyHitters(capacity)
        for key in part:
            hitters.add(key, 1)
        merged.merge(hitters.counters, lambda one, other: one + other)
    true, counters = Counter(key for part in parts for key in part), merged.counters
    most = true.total() / capacity
    assert len(counters) == min(capacity, len(true))
    for key, counter in counters.items():
        assert counter.least <= true[key] <= counter.count
        assert counter.excess <= most
        assert 1 <= counter.value <= sum(key in part for part in parts)
    assert all(key in counters for key, times in true.items() if times > most)
    # It goes on counting.
    for key in parts[0]:
        merged.add(key, 1)
    true.update(parts[0])
    for key, counter in merged.counters.items():
        assert counter.least <= true[key] <= counter.count
