"""Agents: transcripts grow, and a share of steps comes again word for word."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.bench.workloads.asked import bodies, made


@given(st.integers(1, 6), st.floats(0, 1), st.integers(0, 10**12))
def test_transcripts_grow_or_stay(steps: int, retry: float, number: int) -> None:
    said = [
        b["messages"] for b in bodies(made(f"agents:steps={steps},retry={retry}").session(number))
    ]
    grown = 1
    for before, after in pairwise(said):
        assert after[: len(before)] == before
        assert len(after) - len(before) in (0, 2)
        grown += after != before
    assert grown == steps


def test_a_share_of_steps_is_sent_again() -> None:
    workload = made("agents:steps=5,system=8")
    sessions = [workload.session(number) for number in range(400)]
    again = sum(len(session.steps) - 5 for session in sessions)
    assert again / 2000 == pytest.approx(0.2, abs=0.05)
    firsts = {session.steps[0].body for session in sessions}
    assert len(firsts) == 400
    assert len({bodies(s)[0]["messages"][0]["content"] for s in sessions[:50]}) == 1
    assert len(list(made("agents").repeated())) == 1
