"""What a tier lost: never trusted by mistake, and bounded."""

from hypothesis import given
from hypothesis import strategies as st

from tiers.resilience.failed_writes import FailedWrites

STEPS = st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=40)


@given(STEPS, st.integers(1, 4))
def test_hides_what_is_older_than_a_loss(steps: list[tuple[str, bool]], max_keys: int) -> None:
    losses, truth = FailedWrites(max_keys), {}
    for now, (key, is_lost) in enumerate(steps):
        if is_lost:
            losses.add(key, now)
            truth[key] = now
        else:
            losses.discard(key)
            truth.pop(key, None)
        assert sum(key in losses for key in "abcdef") <= max_keys
        for lost, since in truth.items():
            assert losses.may_be_stale(lost, since - 1)
        assert not losses.may_be_stale(key, now)


def test_hides_nothing_else_while_there_is_room() -> None:
    losses = FailedWrites(2)
    losses.add("a", 10)
    losses.add("b", 20)
    assert not losses.may_be_stale("c", 0)
    losses.add("a", 30)
    assert losses.may_be_stale("a", 29)
    losses.add("c", 40)
    assert "b" not in losses
    assert losses.may_be_stale("anything", 19)
    assert not losses.may_be_stale("anything", 20)
