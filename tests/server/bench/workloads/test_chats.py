"""Chats: turns grow, and as many repeat as the options say."""

from itertools import pairwise
from statistics import mean

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.bench.workloads.asked import bodies, made


@given(
    turns=st.integers(1, 5), system=st.integers(0, 20), user=st.integers(0, 20),
    assistant=st.integers(1, 20), number=st.integers(0, 10**12),
)  # fmt: skip
def test_each_turn_has_all_before_it(turns, system, user, assistant, number) -> None:
    spec = f"chat:turns={turns},system={system},user={user},assistant={assistant}"
    session = made(spec).session(number)
    said = [body["messages"] for body in bodies(session)]
    assert len(said) == turns
    assert session.steps[0].think_s == 0
    assert all(step.think_s > 0 for step in session.steps[1:])
    for before, after in pairwise(said):
        assert after[: len(before)] == before
        scripted, asked = after[len(before) :]
        assert (scripted["role"], asked["role"]) == ("assistant", "user")
        assert len(scripted["content"].split()) == assistant
    assert [each["role"] for each in said[0]] == ["system", "user"][not system :]
    if system:
        assert len(said[0][0]["content"].split()) == system


@pytest.mark.parametrize(
    ("spec", "share"), [("chat", 0.2), ("conversation", 0.02), ("chat:repeat=1,known=7", 1)]
)
def test_a_share_of_chats_repeats(spec: str, share: float) -> None:
    workload = made(spec)
    known = {step.body for step in workload.repeated()}
    sessions = [workload.session(number) for number in range(600)]
    repeat = [all(step.body in known for step in session.steps) for session in sessions]
    assert mean(repeat) == pytest.approx(share, abs=0.08)
    others = [s.steps[0].body for s, repeats in zip(sessions, repeat, strict=True) if not repeats]
    assert len(set(others)) == len(others)
    pauses = [step.think_s for session in sessions for step in session.steps[1:]]
    assert mean(pauses) == pytest.approx(2.0, rel=0.12)


def test_a_warm_cache_knows_the_system_prompts_where_no_chat_repeats() -> None:
    workload = made("chat:repeat=0,systems=3")
    warm = [orjson.loads(step.body)["messages"][0] for step in workload.repeated()]
    used = [bodies(workload.session(number))[0]["messages"][0] for number in range(50)]
    assert len(warm) == 3
    assert all(warm.count(each) == 1 for each in used)
    assert list(made("chat:repeat=0,system=0").repeated()) == []
