"""When an upstream gets no requests, and when it gets them again."""

from server.engine.routing.ejection import FAILURES, FIRST_S, LONGEST_S, Ejection


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def fail(ejection: Ejection, times: int = FAILURES) -> list[bool]:
    return [ejection.note_failure() for _ in range(times)]


def test_failures_in_a_row_eject_for_a_while() -> None:
    clock = Clock()
    ejection = Ejection(clock)
    assert fail(ejection) == [False] * (FAILURES - 1) + [True]
    assert ejection.is_out
    clock.now += FIRST_S
    assert not ejection.is_out


def test_an_answer_between_failures_saves_it() -> None:
    ejection = Ejection(Clock())
    for _ in range(3):
        fail(ejection, FAILURES - 1)
        ejection.clear()
    assert not ejection.is_out


def test_one_that_fails_again_is_out_for_longer() -> None:
    clock = Clock()
    ejection = Ejection(clock)
    fail(ejection)
    lasted = []
    for _ in range(8):
        began = clock.now
        while ejection.is_out:
            clock.now += 1.0
        lasted.append(clock.now - began)
        # What was under way meanwhile counts no more than the first that comes.
        assert fail(ejection, 3) == [True, False, False]
    assert lasted[:3] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S]
    assert lasted[-1] == LONGEST_S


def test_it_begins_anew_after_an_answer() -> None:
    clock = Clock()
    ejection = Ejection(clock)
    fail(ejection)
    ejection.clear()
    assert not ejection.is_out
    assert fail(ejection) == [False] * (FAILURES - 1) + [True]
    clock.now += FIRST_S
    assert not ejection.is_out
