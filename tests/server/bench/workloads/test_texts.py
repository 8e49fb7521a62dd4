"""Texts: the same everywhere, of as many tokens as words."""

from math import exp
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.workloads.texts import (
    WORDS,
    draw,
    first_questions,
    question,
    search_query,
    thinking_s,
    words,
)

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5)
labels = st.lists(st.integers() | texts, max_size=3).map(tuple)


def test_a_byte_chooses_a_word() -> None:
    assert len(set(WORDS)) == len(WORDS) == 256
    assert len(first_questions()) == 80


@given(st.integers(), labels, st.integers(0, 600), st.integers(0, 600))
def test_fewer_words_are_the_beginning_of_more(seed: int, label, few: int, more: int) -> None:
    text = words(seed, label, few + more)
    assert len(text.split()) == few + more
    assert text.split()[:few] == words(seed, label, few).split()


@given(st.integers(), labels, labels)
def test_another_label_or_seed_gives_other_words(seed: int, one, other) -> None:
    assert (words(seed, one, 20) == words(seed, other, 20)) == (
        [*map(str, one)] == [*map(str, other)]
    )
    assert words(seed, one, 20) != words(seed + 1, one, 20)


@given(st.integers(), labels)
def test_numbers_are_from_0_to_1(seed: int, label) -> None:
    assert 0 <= draw(seed, *label) < 1


def test_numbers_are_uniform_and_times_exponential() -> None:
    drawn = sorted(draw(3, number) for number in range(10_000))
    # Kolmogorov and Smirnov's distance: more has a probability below 1e-7.
    assert max(abs(at - n / 10_000) for n, at in enumerate(drawn)) < 0.03
    times = [thinking_s(3, 2.0, number, 1) for number in range(10_000)]
    assert mean(times) == pytest.approx(2.0, rel=0.05)
    assert sum(time > 4 for time in times) / 10_000 == pytest.approx(exp(-2), abs=0.02)
    assert thinking_s(3, 2.0, 7, 0) == 0


def test_versions_make_the_same_unless_the_digests_of_workloads_change() -> None:
    assert words(5, ("block", 7), 4) == "image door box card"
    assert draw(5, "a") == 0.5646037948572058
    asked = "Give three reasons why a cause grass should have a age cook and no front easy."
    assert question(5, 1) == asked
    assert search_query(5, 1) == "cheap cause grass age cook near front easy"
