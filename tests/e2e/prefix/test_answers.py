"""Two vLLMs go on with what two others on the same folder left when they were killed.

Run in the order written.
"""

from contextlib import closing

import pytest

from tiers.prefix_kv.maintenance import verify

from .conftest import ADAPTED, LONG, Pair, Written, halves, times_stored, together, unlike, until
from .engine import BLOCK, POET, Answer, Engine
from .prompts import Prompt

pytestmark = pytest.mark.engine


def test_what_killed_engines_have_indexed_verifies(written: Written, engines: Pair) -> None:
    with closing(engines[0].open_store()) as store:
        blocks, damaged = verify(store)
    distinct = {tuple(each.tokens[: each.shared]) for each in written.asked}
    assert blocks >= sum(len(each) for each in distinct) // BLOCK
    assert damaged == 0


def test_answers_from_disk_are_those_of_the_engines_own_cache(
    written: Written, engines: Pair
) -> None:
    """Each engine is asked what the other one's predecessor has answered."""

    def ask(engine: Engine, half: list[Prompt]) -> list[Answer]:
        answers = []
        for number, each in enumerate(half):
            engine.forget()
            answers.append(engine.ask(each.tokens, stream=number % 2 == 1))
        return answers

    first, second = halves(written.asked)
    by_second, by_first = together(lambda: ask(engines[1], first), lambda: ask(engines[0], second))
    answers = by_second + by_first
    assert len(answers) >= 60
    assert [each.cached for each in written.answers] == [each.shared for each in written.asked]
    assert [each.cached for each in answers] == [each.shared for each in written.asked]
    # A stream doesn't say where the tokens came from.
    assert [each.loaded for each in answers[::2]] == [each.shared for each in written.asked[::2]]
    assert [each.tokens for each in answers] == [each.tokens for each in written.answers]
    assert [each.logprobs for each in answers] == [each.logprobs for each in written.answers]


@pytest.mark.skipif(not LONG, reason="takes minutes")
def test_streams_and_bodies_are_the_same(written: Written, engines: Pair) -> None:
    for number, (each, expected) in enumerate(zip(written.asked, written.answers, strict=True)):
        engines[0].forget()
        answer = engines[0].ask(each.tokens, stream=number % 2 == 0)
        assert (answer.tokens, answer.logprobs) == (expected.tokens, expected.logprobs)


def test_blocks_stored_at_the_kill_are_right(written: Written, engines: Pair) -> None:
    for prompt in written.last:
        again = engines[0].ask(prompt, tokens=4)
        fresh = engines[1].ask(prompt, tokens=4, cache_salt="computed")
        assert fresh.cached == 0
        assert again.agrees(fresh)


def test_engines_find_each_others_blocks(engines: Pair) -> None:
    prompt = unlike(100, 2)
    first = engines[0].ask(prompt)
    until(lambda: times_stored(engines[0], prompt[: 2 * BLOCK]))
    second = engines[1].ask(prompt)
    assert (first.loaded, second.loaded) == (0, 2 * BLOCK)
    assert second.agrees(first)


def test_an_adapter_has_blocks_of_its_own(written: Written, engines: Pair) -> None:
    answers = [engines[0].ask(each.tokens, model=POET) for each in written.asked[:ADAPTED]]
    assert [each.loaded for each in answers] == [written.asked[0].shared, *[0] * (ADAPTED - 1)]
    assert [each.tokens for each in answers] == [each.tokens for each in written.adapted]
    assert answers[0].tokens != written.answers[0].tokens


def test_an_adapter_with_other_contents_finds_nothing(written: Written, engines: Pair) -> None:
    answer = engines[1].ask(written.asked[0].tokens, model=POET)
    assert answer.cached == 0
    assert answer.tokens not in (written.adapted[0].tokens, written.answers[0].tokens)


def test_salts_keep_prompts_apart(engines: Pair) -> None:
    prompt = unlike(101, 1)
    engines[0].ask(prompt, cache_salt="a.1")
    until(lambda: times_stored(engines[0], prompt[:BLOCK]))
    salts = {"cache_salt": "b.1"}, {}, {"cache_salt": "a.1"}
    assert [engines[1].ask(prompt, **salt).cached for salt in salts] == [0, 0, BLOCK]


def test_a_prefix_is_loaded_once_for_all_who_wait_for_it(engines: Pair) -> None:
    prompt = unlike(100, 2)
    engines[0].forget()
    answers = engines[0].ask_all([prompt] * 4, at_once=4)
    assert [each.cached for each in answers] == [2 * BLOCK] * 4
    assert sum(each.loaded for each in answers) == 2 * BLOCK
