import numpy as np
import orjson
import pytest
from jsonschema import Draft202012Validator

from server.bench.load import Load
from server.bench.records import Failure
from server.bench.results.figures import (
    build_result,
    errors,
    figures,
    hit_ratio,
    prompt_tokens_reused,
)
from server.bench.results.objective import parse
from server.bench.results.result_schema import Result, as_json_schema

from .rows import make_measured, make_records, make_settings

MIXED = {
    "outcomes": ["memory", "miss", "failed"],
    "outcome": [0, 1, 1, 2],
    "failure": [0, 0, 0, Failure.STATUS],
    "status": [200, 200, 200, 503],
    "prompt_tokens": [10, 20, 40, -1],
    "completion_tokens": [5, 5, 15, -1],
    "cached_tokens": [16, -1, 16, -1],
    "loaded_tokens": [0, 8, 0, 0],
}


def as_stored(result):
    Draft202012Validator(orjson.loads(as_json_schema())).validate(
        stored := orjson.loads(orjson.dumps(result))
    )
    Result.model_validate(stored)
    return stored


def test_tokens_that_are_served_are_apart_from_those_generated():
    found = figures(make_records(np.arange(4.0), **MIXED), 10.0, open_loop=True)
    assert (found["requests"], found["failed"], found["requests_per_s"]) == (4, 1, 0.3)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (70, 25)
    assert (found["tokens_served_per_s"], found["tokens_generated_per_s"]) == (2.5, 2.0)
    assert found["ttft_s"]["count"] == 3


def test_hits_count_by_requests_and_by_tokens():
    records = make_records(np.arange(4.0), **MIXED)
    assert hit_ratio(records) == {"requests": pytest.approx(1 / 3), "tokens": 15 / 95}
    assert hit_ratio(make_records([], outcomes=())) == {"requests": None, "tokens": None}


def test_prompt_tokens_are_reused_by_misses():
    assert prompt_tokens_reused(make_records(np.arange(4.0), **MIXED)) == {"tokens": 24, "of": 60}


def test_errors_are_counted_by_kind():
    kinds = [Failure.STATUS] * 3 + [Failure.TIMEOUT]
    records = make_records(np.zeros(4), failure=kinds, status=[503, 503, 429, 0])
    assert errors(records) == {"status 503": 2, "status 429": 1, "timeout": 1}


def test_a_result_keeps_its_published_schema():
    due = np.arange(1000) / 100
    records = make_records(
        due,
        first_token=due + 0.1,
        last_token=due + 0.5,
        outcomes=["memory", "miss"],
        outcome=np.arange(1000) % 2,
        probe=np.arange(1000) % 10 == 0,
        gaps=[(row, 0.1) for row in range(1000)],
    )
    settings = make_settings(
        load=Load(rate=90.0, duration_s=10.0), objective=parse("ttft=200ms,miss.e2e=1s@99%")
    )
    result = as_stored(build_result(make_measured(records, scheduled=900), settings))
    assert result["valid"]
    assert result["elapsed_s"] == pytest.approx(10.49)
    assert result["whole"]["requests"] == 900
    assert result["probe"]["requests"] == 100
    assert result["outcomes"].keys() == {"memory", "miss"}
    assert result["outcomes"]["memory"]["ttft_s"]["p50"] == pytest.approx(0.1)
    assert result["whole"]["e2e_due_s"]["too_few"] == ["p99", "p99.9"]
    assert result["goodput"]["holds"]
    assert result["hit_ratio"]["requests"] == pytest.approx(4 / 9)
    assert "secret" not in str(result)
    assert "Bearer" not in str(result)
    assert result["target"]["url"] == "http://127.0.0.1:8000"


@pytest.mark.parametrize("load", [Load(rate=1.0, duration_s=1.0), Load(users=2, sessions=5)])
@pytest.mark.parametrize("count", [0, 1])
def test_results_of_hardly_anything_have_the_schema_too(load, count):
    records = make_records(
        np.zeros(count), failure=Failure.CONNECT, outcomes=["failed"][:count], end=1.0
    )
    measured = make_measured(records, interrupted=True, offered_s=0.0)
    result = as_stored(build_result(measured, make_settings(load=load)))
    assert not result["valid"]
    assert result["whole"]["ttft_s"] is None


def test_the_corrected_p99_of_a_server_that_stalls_is_that_of_arithmetic():
    """A closed gate for 2 s in each 10 s, constant arrivals: who comes in it waits for its end."""
    due = np.arange(0, 100, 0.01)
    phase = np.mod(due, 10.0)
    sent_on = due + np.where(phase < 2.0, 2.0 - phase, 0.0) + 0.001
    found = figures(make_records(due, due, sent_on), 100.0, open_loop=True)
    # 20% wait for up to 2 s, evenly: 1% of all wait for more than 1.9 s.
    assert found["e2e_due_s"]["p99"] == pytest.approx(1.9 + 0.001, rel=0.02)
