from hypothesis import given
from hypothesis import strategies as st

from server.telemetry.history import STEP_S, STEPS, History

DAY_S = STEP_S * STEPS
TIERS = ("memory", "disk", "engine")
notes = st.lists(
    st.tuples(st.integers(1, 3 * STEPS), st.sampled_from(TIERS), st.integers(0, 9)), max_size=60
)


@given(notes, st.integers(0, STEPS))
def test_the_last_day_is_told(given_: list[tuple[int, str, int]], later: int) -> None:
    history, given_ = History(), sorted(given_)
    for step, tier, tokens in given_:
        history.add(step * STEP_S + 1, tier, tokens, tokens / 2)
    now = (given_[-1][0] if given_ else 1) + later
    report = history.report(now * STEP_S + 2)
    first = max(now - STEPS + 1, given_[0][0]) if given_ else now + 1
    shown = range(first, now + 1)
    assert report["ends_at"] == (now + 1) * STEP_S
    for tier in TIERS:
        ring = report["answered"].get(tier, [0] * len(shown))
        assert ring == [sum(s == step and t == tier for s, t, _ in given_) for step in shown]
    assert report["tokens_saved"] == [sum(n for s, _, n in given_ if s == step) for step in shown]
    assert sum(report["seconds_saved"]) == sum(report["tokens_saved"]) / 2
    assert report["saved_since_start"]["tokens"] == sum(tokens for *_, tokens in given_)


def test_a_clock_that_is_set_back_counts_on() -> None:
    history = History()
    history.add(10 * DAY_S, "memory", 1, 1)
    history.add(9 * DAY_S, "memory", 1, 1)
    assert history.report(9 * DAY_S)["answered"] == {"memory": [2]}


def test_nothing_is_told_of_nothing() -> None:
    report = History().report(10 * DAY_S)
    assert (report["answered"], report["tokens_saved"], report["seconds_saved"]) == ({}, [], [])
