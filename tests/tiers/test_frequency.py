"""The frequency sketch: never too low until it ages, and the same after a restart."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers import digest
from tiers.frequency import FrequencySketch

KEYS = st.one_of(
    st.sampled_from("abcdef"), st.integers(0, 99).map(lambda number: digest(b"%d" % number))
)


def key(number: int) -> str:
    return digest(b"%d" % number)


def restore(sketch: FrequencySketch, data: bytes) -> None:
    for _ in sketch.load(data):
        pass


@given(st.lists(KEYS, max_size=300), st.integers(1, 64))
def test_never_underestimates_before_it_ages(keys: list[str], capacity: int) -> None:
    sketch = FrequencySketch(capacity)
    for seen, one in enumerate(keys[: 10 * capacity - 1], start=1):
        assert sketch.record(one) == sketch.estimate(one)
        truth = Counter(keys[:seen])
        assert sketch.estimate(one) >= min(truth[one], 15)


def test_is_exact_with_room_to_spare() -> None:
    sketch = FrequencySketch(1 << 16)
    for number in range(100):
        for _ in range(number % 20):
            sketch.record(key(number))
    assert [sketch.estimate(key(number)) for number in range(100)] == [
        min(number % 20, 15) for number in range(100)
    ]


def test_its_errors_are_as_rare_as_promised() -> None:
    sketch = FrequencySketch(4096)
    for number in range(4096):
        sketch.record(key(number))
    too_high = sum(sketch.estimate(key(number)) > 2 for number in range(4096, 8192))
    assert too_high < 4096 / 16


def test_ages() -> None:
    sketch = FrequencySketch(64)
    for _ in range(12):
        sketch.record("popular once")
    for number in range(64 * 10):
        sketch.record(key(number))
    assert sketch.estimate("popular once") <= 6 + 3
    for number in range(64 * 10 * 6):
        sketch.record(key(1000 + number % 16))
    assert sketch.estimate("popular once") == 0


def test_doubles_without_changing_an_estimate() -> None:
    sketch = FrequencySketch(64)
    for number in range(300):
        sketch.record(key(number * number % 90))
    before = [sketch.estimate(key(number)) for number in range(90)]
    sketch.double()
    assert sketch.capacity == 128
    assert [sketch.estimate(key(number)) for number in range(90)] == before


@given(st.lists(KEYS, max_size=100), st.integers(1, 100))
def test_survives_dump_and_restore(keys: list[str], capacity: int) -> None:
    sketch = FrequencySketch(capacity)
    for one in keys:
        sketch.record(one)
    again = FrequencySketch(capacity)
    restore(again, sketch.dump())
    assert again.dump() == sketch.dump()
    for one in keys * 20:
        assert again.record(one) == sketch.record(one)


@given(st.lists(KEYS, max_size=150), st.lists(KEYS, max_size=150))
def test_restoring_adds_to_what_was_counted_meanwhile(before: list[str], since: list[str]) -> None:
    saved, sketch = FrequencySketch(64), FrequencySketch(64)
    for one in before:
        saved.record(one)
    for one in since:
        sketch.record(one)
    counted = {one: (saved.estimate(one), sketch.estimate(one)) for one in {*before, *since}}
    restore(sketch, saved.dump())
    for one, counts in counted.items():
        assert sketch.estimate(one) >= min(sum(counts), 15)


def test_restoring_is_exact_with_room_to_spare() -> None:
    saved, sketch = FrequencySketch(1 << 16), FrequencySketch(1 << 16)
    for number in range(100):
        for _ in range(number % 10):
            saved.record(key(number))
        for _ in range(number % 12):
            sketch.record(key(number))
    restore(sketch, saved.dump())
    assert [sketch.estimate(key(number)) for number in range(100)] == [
        min(number % 10 + number % 12, 15) for number in range(100)
    ]


def test_counts_what_is_recorded_while_it_is_restored() -> None:
    saved, sketch = FrequencySketch(1 << 16), FrequencySketch(1 << 16)
    for number in range(100):
        saved.record(key(number))
    sketch.record(key(0))
    steps = 0
    for _ in sketch.load(saved.dump()):
        steps += 1
        for number in range(100):
            sketch.record(key(number))
    assert steps > 1
    assert [sketch.estimate(key(number)) for number in range(100)] == [
        1 + steps + (number == 0) for number in range(100)
    ]


def test_halving_while_it_is_restored_loses_no_more_than_half() -> None:
    saved, sketch = FrequencySketch(1 << 15), FrequencySketch(1 << 15)
    for number in range(800):
        saved.record(key(number % 100))
    for _ in range(10 * sketch.capacity - 1):
        sketch.record("popular")
    for _ in sketch.load(saved.dump()):
        sketch.record("popular")
    assert {sketch.estimate(key(number)) for number in range(100)} <= {4, 8}


def test_restoring_ages_when_it_is_due() -> None:
    saved, sketch = FrequencySketch(16), FrequencySketch(16)
    for half in (saved, sketch):
        for _ in range(80):
            half.record("a")
    restore(sketch, saved.dump())
    assert sketch.estimate("a") == 7
    for _ in range(79):
        sketch.record("a")
    assert sketch.estimate("a") == 15
    sketch.record("a")
    assert sketch.estimate("a") == 7


@pytest.mark.parametrize(
    "data", [b"", b"\x01\x06", b"\x01" + FrequencySketch(64).dump()[1:], b"\x01\xff" + bytes(8)]
)
def test_refuses_what_it_did_not_write(data: bytes) -> None:
    with pytest.raises(ValueError, match="sketch is"):
        restore(FrequencySketch(64), data)
    with pytest.raises(ValueError, match="cut short or too long"):
        restore(FrequencySketch(64), FrequencySketch(64).dump() + b"x")
    with pytest.raises(ValueError, match="another capacity"):
        restore(FrequencySketch(64), FrequencySketch(128).dump())


def test_has_a_capacity() -> None:
    with pytest.raises(ValueError, match="positive"):
        FrequencySketch(0)
