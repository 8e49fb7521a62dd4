import numpy as np
import pytest

from server.bench.records import Failure
from server.bench.results.latencies import (
    completion_tokens,
    first_token,
    is_hit,
    last_token,
    latencies,
    time_per_token,
)

from .rows import make_records


def test_latencies_are_from_sending_and_from_when_due():
    records = make_records(
        due=[0.0, 1.0], sent=[0.1, 1.0], first_token=[0.3, 1.5], last_token=[0.7, 3.5],
        gaps=[(0, 0.1), (1, 0.5), (0, 0.3)],
    )  # fmt: skip
    found = latencies(records, open_loop=True)
    expected = {
        "ttft_s": [0.2, 0.5], "ttft_due_s": [0.3, 0.5], "e2e_s": [0.6, 2.5],
        "e2e_due_s": [0.7, 2.5], "tpot_s": [0.1, 0.5], "itl_s": [0.1, 0.5, 0.3],
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].values == pytest.approx(np.array(values))
    assert found["itl_s"].rows.tolist() == [0, 1, 0]


def test_a_closed_loop_has_no_times_from_when_due():
    assert latencies(make_records([0.0]), open_loop=False).keys() == {
        "ttft_s", "tpot_s", "itl_s", "e2e_s",
    }  # fmt: skip


def test_failed_requests_have_no_latencies():
    records = make_records(
        [0.0, 1.0, 2.0], failure=[Failure.TIMEOUT, 0, Failure.STATUS], gaps=[(0, 9.0), (1, 0.1)]
    )
    found = latencies(records, open_loop=True)
    assert all(sample.rows.tolist() == [1] for sample in found.values())


def test_an_answer_without_tokens_ends_when_its_body_does():
    records = make_records([0.0], first_token=[np.nan], last_token=[np.nan], end=[4.0])
    assert (first_token(records)[0], last_token(records)[0]) == (4.0, 4.0)


@pytest.mark.parametrize(
    ("completion", "prompt", "tokens"), [(7, 20, 7), (0, 20, 0), (-1, 20, 0), (-1, -1, 5)]
)
def test_tokens_are_of_usage_or_else_events(completion, prompt, tokens):
    records = make_records([0.0], completion_tokens=completion, prompt_tokens=prompt)
    assert completion_tokens(records).tolist() == [tokens]


def test_an_answer_in_one_piece_or_of_one_token_has_no_time_per_token():
    records = make_records([0.0] * 3, chunks=[1, 5, 2], completion_tokens=[5, 1, 2])
    assert np.isnan(time_per_token(records)).tolist() == [True, True, False]


def test_hits_are_whole_answers_that_a_cache_gave():
    names = ["memory", "miss", "collapsed", "bypass"]
    records = make_records(
        [0.0] * 5, outcomes=names, outcome=[0, 1, 2, 3, 0], failure=[0, 0, 0, 0, 2]
    )
    assert is_hit(records).tolist() == [True, False, True, False, False]
    assert is_hit(make_records([], outcomes=())).tolist() == []
