"""What a tier lost: never trusted by mistake, and bounded."""

from hypothesis import given
from hypothesis import strategies as st

from tiers.failed_writes import Losses

STEPS = st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=40)


@given(STEPS, st.integers(1, 4))
def test_hides_what_is_older_than_a_loss(steps: list[tuple[str, bool]], max_keys: int) -> None:
    losses, truth = Losses(max_keys), {}
    for now, (key, is_lost) in enumerate(steps):
        if is_lost:
            losses.note(key, now)
            truth[key] = now
        else:
            losses.forget(key)
            truth.pop(key, None)
        assert sum(key in losses for key in "abcdef") <= max_keys
        for lost, since in truth.items():
            assert losses.hides(lost, since - 1)
        assert not losses.hides(key, now)


def test_hides_nothing_else_while_there_is_room() -> None:
    losses = Losses(2)
    losses.note("a", 10)
    losses.note("b", 20)
    assert not losses.hides("c", 0)
    losses.note("a", 30)
    assert losses.hides("a", 29)
    losses.note("c", 40)
    assert "b" not in losses
    assert losses.hides("anything", 19)
    assert not losses.hides("anything", 20)
