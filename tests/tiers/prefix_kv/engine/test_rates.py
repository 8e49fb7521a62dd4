"""Whether a load is worth it."""

import pytest

from tiers.prefix_kv.engine.rates import LoadGate


@pytest.fixture
def gate(clock) -> LoadGate:
    return LoadGate(256, clock)


def test_until_rates_are_known_loads_are_worth_it(gate):
    assert gate.is_worth(256)
    assert not gate.is_worth(255)


def test_a_slower_load_is_tried_now_and_then(gate, clock):
    gate.note_computed(1000, 1.0)
    assert gate.note_loaded(1000, 2.0) == -1.0
    assert not gate.is_worth(1000)
    clock.now += 61
    assert gate.is_worth(1000)
    for _ in range(10):
        assert gate.note_loaded(1000, 0.1) == 0.9
    assert gate.is_worth(1000)


def test_steps_that_generate_say_nothing(gate):
    gate.note_computed(8, 1.0)
    gate.note_computed(1000, 0.0)
    assert gate.note_loaded(1000, 2.0) == 0.0
    assert gate.is_worth(1000)


def test_a_load_may_take_as_long_as_computing(gate):
    unknown = gate.deadline_s(1000)
    gate.note_computed(100, 1.0)
    assert gate.deadline_s(1000) == 10.0
    assert gate.deadline_s(1) == 0.5
    assert unknown == 10.0


def test_the_more_loads_fail_the_longer_it_waits(gate, clock):
    pauses = []
    for _ in range(9):
        gate.note_failed()
        assert not gate.is_worth(1000)
        began_at = clock.now
        while not gate.is_worth(1000):
            clock.now += 0.5
        pauses.append(clock.now - began_at)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    gate.note_loaded(1000, 0.1)
    gate.note_failed()
    clock.now += 1
    assert gate.is_worth(1000)
