from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.clients.outcomes import OUTCOMES
from server.bench.records import Failure
from server.bench.results.objective import Limit, parse
from server.config.base import ConfigError

from .rows import make_records


def test_an_objective_has_limits_for_all_or_for_an_outcome():
    found = parse("ttft=200ms, itl=50ms,e2e=1.5min,memory.ttft=500us@99.9%")
    assert found.limits == (
        Limit("ttft", 0.2), Limit("itl", 0.05), Limit("e2e", 90.0), Limit("ttft", 5e-4, "memory"),
    )  # fmt: skip
    assert found.share == pytest.approx(0.999)
    assert parse("tpot=50ms").share == 0.99


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("", "ttft=200ms"),
        ("ttft=200", "ttft=200ms"),
        ("ttft=-1s", "ttft=200ms"),
        ("ttft=0s", "above 0"),
        ("latency=1s", "ttft, tpot, itl, e2e"),
        ("ttft=1s@", "@99%"),
        ("ttft=1s@100%", "below 100%"),
        ("ttft=1s@0%", "above 0%"),
        ("ttft=1s@.99", "@99%"),
        ("ttft=1s,ttft=2s", "each metric once"),
        ("ttft=1s,,e2e=1s", "ttft=200ms"),
    ],
)
def test_a_wrong_objective_names_the_option_and_what_would_be_right(text, right):
    with pytest.raises(ConfigError) as raised:
        parse(text)
    (mistake,) = raised.value.mistakes
    assert mistake.startswith("--objective: ")
    assert right in mistake


@given(st.text())
def test_any_text_is_an_objective_or_a_mistake(text):
    with suppress(ConfigError):
        assert parse(text).limits


def test_users_wait_from_when_a_request_was_due():
    records = make_records(due=[0.0, 0.0], sent=[0.0, 0.5], first_token=[0.1, 0.6])
    objective = parse("ttft=200ms")
    assert objective.keeps(records, open_loop=True).tolist() == [True, False]
    assert objective.keeps(records, open_loop=False).tolist() == [True, True]


def test_each_gap_keeps_itl_and_the_mean_keeps_tpot():
    records = make_records(
        [0.0, 0.0], first_token=[0.1, 0.1], last_token=[0.5, 0.5],
        gaps=[(0, 0.1)] * 4 + [(1, 0.01)] * 3 + [(1, 0.37)],
    )  # fmt: skip
    assert parse("itl=110ms").keeps(records, open_loop=True).tolist() == [True, False]
    assert parse("tpot=110ms").keeps(records, open_loop=True).tolist() == [True, True]
    assert parse("tpot=90ms").keeps(records, open_loop=True).tolist() == [False, False]
    single = make_records([0.0], completion_tokens=1)
    assert parse("tpot=1ms").keeps(single, open_loop=True).tolist() == [True]


def test_itl_binds_rows_whose_gaps_were_too_many_to_keep():
    records = make_records([0.0, 0.0], gaps=[(0, 0.2), (1, 0.01)])
    records.gaps, records.gap_row = np.zeros(0), np.zeros(0, dtype=np.int64)
    assert parse("itl=110ms").keeps(records, open_loop=True).tolist() == [False, True]


def test_a_limit_of_an_outcome_binds_only_that():
    records = make_records(
        [0.0] * 4, first_token=[0.1, 0.1, 0.001, 2.0], outcomes=["miss", "memory"],
        outcome=[0, 1, 1, 0],
    )  # fmt: skip
    kept = parse("ttft=1s,memory.ttft=5ms,disk.ttft=1us").keeps(records, open_loop=True)
    assert kept.tolist() == [True, False, True, False]


def test_a_limit_that_binds_no_request_is_named():
    records = make_records([0.0], outcomes=["miss"])
    objective = parse("memory.ttft=5ms,memory.e2e=1s,miss.e2e=1s,ttft=1s", OUTCOMES)
    assert objective.attainment(records, 1.0, open_loop=True)["unseen"] == ["memory"]
    with pytest.raises(ConfigError, match=r"should limit one of memory, disk.*not 'momory'"):
        parse("momory.ttft=5ms", OUTCOMES)
    assert parse("l2.ttft=5ms").limits[0].outcome == "l2"


def test_failed_requests_miss_an_objective_and_cut_ones_count_neither_way():
    records = make_records(
        np.zeros(4), failure=[0, Failure.TIMEOUT, Failure.INTERRUPTED, 0],
        outcomes=["miss", "failed"], outcome=[0, 1, 1, 0],
    )  # fmt: skip
    found = parse("e2e=1s@50%").attainment(records, 2.0, open_loop=True)
    assert (found["requests"], found["good"], found["holds"]) == (3, 2, True)
    assert found["attainment"] == pytest.approx(2 / 3)
    assert found["requests_per_s"] == 1.0
    assert found["outcomes"]["failed"]["good"] == 0
    assert found["outcomes"]["miss"]["attainment"] == 1.0


def test_no_requests_hold_no_objective():
    found = parse("e2e=1s").attainment(make_records([], outcomes=()), 0.0, open_loop=True)
    assert not found["holds"]
    assert found["interval"] == [0.0, 1.0]
