"""Ghosts: what was evicted lately is known, what was evicted long ago isn't."""

from hypothesis import given
from hypothesis import strategies as st

from tiers.policies.ghosts import Ghosts

ROOMY = 1024 * 1024
STEPS = st.lists(
    st.tuples(st.sampled_from("abcdefghijkl"), st.integers(0, 1), st.integers(1, 500)), max_size=60
)


@given(STEPS, st.integers(1, 3000), st.integers(1, 3000))
def test_knows_what_each_list_evicted_within_its_span(
    steps: list[tuple[str, int, int]], once: int, again: int
) -> None:
    ghosts, spans = Ghosts(ROOMY), (once, again)
    evicted_at: dict[str, tuple[int, int]] = {}
    for key, which, size in steps:
        # As a policy does: what comes back is taken before it can be evicted again.
        evicted_at.pop(key, None)
        ghosts.pop(key, spans)
        ghosts.add(key, which, size, spans)
        evicted_at[key] = which, ghosts.evicted_bytes[which]
    for key in "abcdefghijkl":
        which, at = evicted_at.get(key, (0, -ROOMY))
        expected = which if ghosts.evicted_bytes[which] - at <= spans[which] else None
        assert ghosts.pop(key, spans) == expected
        assert ghosts.pop(key, spans) is None


def test_where_room_is_short_the_oldest_are_lost() -> None:
    ghosts, spans = Ghosts(4 * 256), (10_000, 10_000)
    for number in range(6):
        ghosts.add(str(number), number % 2, 1, spans)
    assert [ghosts.pop(str(number), spans) for number in range(6)] == [None, None, 0, 1, 0, 1]
