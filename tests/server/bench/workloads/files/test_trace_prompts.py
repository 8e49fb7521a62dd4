"""Prompts of traces: as many words as the trace has tokens, and equal where it was."""

from hypothesis import given
from hypothesis import strategies as st

from server.bench.workloads.files.trace_prompts import LEAST_WORDS, TraceOptions, block_prompt
from tests.server.bench.workloads.asked import alike

ids = st.lists(st.integers(0, 3), max_size=6)


def text(blocks, words: int, tokens: int, most: int | None = None) -> list[str]:
    rest = (tuple(blocks), tokens)
    return block_prompt(
        1, blocks, words, tokens, rest, TraceOptions(max_prompt_tokens=most)
    ).split()


@given(ids, st.integers(8, 40), st.integers(0, 300), st.none() | st.integers(16, 200))
def test_a_prompt_has_as_many_words_as_tokens(blocks, words, tokens, most) -> None:
    expected = max(tokens, LEAST_WORDS)
    assert len(text(blocks, words, tokens, most)) == (min(expected, most) if most else expected)


@given(ids, ids, st.integers(8, 40), st.integers(0, 7))
def test_prompts_are_alike_where_their_blocks_are(one, other, words: int, more: int) -> None:
    common = alike(one, other)
    texts = [text(blocks, words, len(blocks) * words + more) for blocks in (one, other)]
    common_words = alike(*texts)
    if one == other:
        assert texts[0] == texts[1]
    else:
        # Two blocks begin with the same three words once in 16 million.
        assert common * words <= common_words < max(common * words, LEAST_WORDS) + 3


@given(ids, ids, st.integers(8, 40), st.integers(16, 60))
def test_cut_prompts_stay_different(one, other, words: int, most: int) -> None:
    texts = [text(blocks, words, len(blocks) * words, most) for blocks in (one, other)]
    assert (texts[0] == texts[1]) == (one == other)
    common = alike(one, other) * words
    common_words = alike(*texts)
    assert common_words >= min(common, most - LEAST_WORDS)
