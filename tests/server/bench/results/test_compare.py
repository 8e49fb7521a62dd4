import numpy as np
import pytest

from server.bench.load import Load
from server.bench.results.compare import as_text, compare, fails
from server.bench.results.figures import build_result
from server.bench.results.result import Run
from server.config.base import ConfigError

from .rows import make_measured, make_records, make_settings

COUNT = 4000


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr("server.bench.results.resample._RESAMPLES", 120)


def make_run(name, *, factor=1.0, seed=0, share=0.5, records=True, **settings):
    """A run with hits of 10 ms and misses of 1 s or, by a factor, more."""
    random = np.random.default_rng(seed)
    due = np.arange(COUNT) / 100
    is_miss = random.random(COUNT) >= share
    ttft = random.exponential(np.where(is_miss, 1.0, 0.01 * factor))
    made = make_records(
        due, due, due + ttft, due + ttft + 0.1, outcomes=["memory", "miss"], outcome=is_miss,
        gaps=[(row, 0.02) for row in range(COUNT)],
    )  # fmt: skip
    load = Load(rate=100.0, duration_s=40.0)
    result = build_result(
        make_measured(made, offered_s=40.0), make_settings(**{"load": load, **settings})
    )
    return Run(name, result, made if records else None)


@pytest.mark.parametrize("records", [True, False])
def test_each_outcome_has_ratios_with_intervals(records):
    a, b = make_run("a", records=records), make_run("b", factor=1.3, seed=1, records=records)
    found = compare(a, b, ["memory.ttft.p50 > 1.1x", "miss.ttft.p50 > 1.1x"])
    slower = found["figures"]["memory.ttft_s.p50"]
    assert slower["low"] < 1.3 < slower["high"]
    assert slower["low"] > 1.15
    same = found["figures"]["miss.ttft_s.mean"]
    assert same["low"] < 1 < same["high"]
    assert found["figures"]["memory.ttft_s.p99.9"]["too_few"]
    assert not slower["too_few"]
    assert found["figures"]["whole.requests_per_s"]["low"] is None
    assert found["figures"]["hit_ratio.requests"]["low"] < 1
    assert [rule["holds"] for rule in found["fail_if"]] == [True, False]
    assert fails(found)
    assert bool(found["notes"]) is not records


def test_the_same_run_twice_is_1x_and_certain():
    a = make_run("a")
    found = compare(a, a, ["whole.e2e_due.p99 > 1x"])
    for name in ("whole.e2e_due_s.p99", "miss.tpot_s.mean"):
        figure = found["figures"][name]
        assert (figure["ratio"], figure["low"], figure["high"]) == (1.0, 1.0, 1.0)
    assert not fails(found)


def test_a_comparison_is_reproducible():
    a, b = make_run("a"), make_run("b", seed=1)
    assert compare(a, b) == compare(a, b)


def test_only_equal_workloads_and_valid_runs_are_compared():
    a = make_run("a")
    for change, says in (
        ({"digest": "d2"}, "same workload, not search .d1. and search .d2."),
        ({"cache": "warm"}, "same state of the cache"),
    ):
        with pytest.raises(ConfigError, match=says):
            compare(a, make_run("b", **change))
    invalid = make_run("b", load=Load(rate=100.0, connections=1))
    with pytest.raises(ConfigError, match=r"compare: b is no valid run: .*--connections"):
        compare(a, invalid)


def test_loads_and_machines_that_differ_are_noted():
    a = make_run("a")
    b = make_run("b", load=Load(rate=99.0, duration_s=40.0), machine={"cores": 8})
    notes = compare(a, b)["notes"]
    assert "the loads differ: rate is 100.0 in A and 99.0 in B" in notes
    assert "the clients' machines differ" in notes


def test_an_outcome_of_one_run_is_left_out():
    only_misses = make_run("b", share=0.0)
    found = compare(make_run("a"), only_misses)
    assert "miss.ttft_s.p50" in found["figures"]
    assert not any(name.startswith("memory.") for name in found["figures"])
    with pytest.raises(ConfigError, match="--fail-if: both runs should have memory"):
        compare(make_run("a"), only_misses, ["memory.ttft.p50 > 2x"])


def test_a_comparison_as_a_table():
    text = as_text(compare(make_run("a"), make_run("b", factor=2, seed=1), ["whole.failed > 1x"]))
    assert "A a, B b" in text
    assert "memory.ttft_s.p50" in text
    assert "95% between" in text
    assert "whole.failed > 1x doesn't hold" in text
