"""Whose turn it is, of several answers to the same request."""

from hypothesis import given
from hypothesis import strategies as st

from server.handlers.variants import Variants


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 5)), max_size=60))
def test_variants_take_turns(steps: list[tuple[str, int]]) -> None:
    variants = Variants()
    last: dict[str, int] = {}
    names: dict[tuple[str, str], int] = {}
    for key, count in steps:
        got = variants.next(key, count)
        turn = last.get(key, -1) + 1
        last[key] = turn % count
        assert names.setdefault((key, got), last[key]) == last[key]
        assert (got == key) == (last[key] == 0)
